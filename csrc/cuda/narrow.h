// Windows of 7 x 7 keys in half precision, which most networks with neighborhood attention use: how the kernels made for
// them cut their work, stage it, and load it from shared memory. docs/cuda.md ("Narrow windows") explains why.
//
// A *group* is 2 x 8 queries, the work of a warp at a time. Their windows lie in a frame of 8 rows and two blocks of 8
// columns; where a class of a dilated map has at most 8 x 8 positions (`Whole`), in 7 rows and one block. So loops over
// keys are constant. Beyond the map a frame has zeros, which no query attends.
#pragma once

#include "kernel.h"
#include "rows.h"

namespace natten_ext::cuda {

constexpr int kNarrowKernel = 7;
constexpr int kNarrowWarps = 8;

// A tensor (batch, y, x, head, channel); strides count bytes.
struct ByteRows {
  unsigned char* data;
  uint32_t batch, head, y, x;
};

struct NarrowParams {
  ByteRows query, key, value, output, grad_output, grad_query;
  Table bias;  // from the entry of the farthest key up and to the left on
  void *base, *log_sum, *natural_lse, *grad_lse, *row_numbers;  // as in Params
  void* table_partials;  // (blocks_per_head, launch_heads, table_rows, table_columns) in float; null: not wanted
  int table_rows, table_columns;
  float scale;
  uint32_t head_bytes;  // of a row
  int height, width, heads;
  int dilation_y, dilation_x;
  int tiles_y, tiles_x;  // of a class; of whole classes: those side by side
  int tiles, blocks_per_head;  // of a head: each block works on every blocks_per_head-th tile
  int launch_heads;
  Divisor by_launch_heads, by_tiles_y, by_tiles_x, by_dilation_y, by_dilation_x;
  uint16_t head[kMaxHeads];
};

// `count` steps further.
NATTEN_EXT_DEVICE uint64_t advanced(uint64_t from, int count, uint32_t step) {
  return from + uint64_t{static_cast<uint32_t>(count)} * step;
}
NATTEN_EXT_DEVICE bool inside(int position, int count) { return static_cast<uint32_t>(position) < static_cast<uint32_t>(count); }

// Unsigned, so that divisions by powers of two are shifts.
NATTEN_EXT_DEVICE uint32_t narrow_thread() { return static_cast<uint32_t>(thread_index()); }
NATTEN_EXT_DEVICE uint32_t narrow_lane() { return narrow_thread() % kWarp; }

// Blocks next to each other have different heads of the launch.
NATTEN_EXT_DEVICE int narrow_block_of_head(const NarrowParams& p) { return p.by_launch_heads(block_x()); }
NATTEN_EXT_DEVICE int narrow_launch_head(const NarrowParams& p) { return block_x() - narrow_block_of_head(p) * p.launch_heads; }

// What a block works on, and where things lie in its shared memory.
template <int Dim, bool Whole>
struct NarrowTile {
  static constexpr int kReach = kNarrowKernel / 2;
  static constexpr int kGroups = Dim <= 16 ? 4 : 2;             // of a warp: as many as shared memory has room for
  static constexpr int kClasses = Whole ? 2 * kGroups : 1;      // side by side
  static constexpr int kHeight = Whole ? 8 : 8 * kGroups, kWidth = Whole ? 8 : 16;                              // of queries
  static constexpr int kRows = Whole ? 8 : kHeight + kNarrowKernel - 1, kColumns = Whole ? 8 : kWidth + 8;  // of staged keys
  static constexpr int kSlots = kClasses * kRows * kColumns;
  static constexpr uint32_t kChunks = Dim / 8, kBytes = 16 * kChunks;  // of a row: chunks of 16 bytes
  static constexpr int kTableRow = 16;  // entries; those from 2 * kNarrowKernel - 1 on are minus infinity
  static constexpr Shared kTableBytes = (2 * kNarrowKernel - 1) * kTableRow * sizeof(float);
  // Regions begin at multiples of 128 bytes. Past the last values is room for a frame's eighth row, which is loaded but not
  // used where whole classes have none. From kOwn on are a kernel's own rows.
  static constexpr Shared kTable = 0, kKeys = (kTableBytes + 127) / 128 * 128, kValues = kKeys + kSlots * kBytes;
  static constexpr Shared kOwn = kValues + (kSlots + 8) * kBytes;

  bool exists;  // smaller classes have fewer tiles
  int batch, head;
  int residue_y, residue_x;  // of the first class
  int height, width;         // of the class; of whole ones only the height is alike
  // The first query. The last tile of an axis begins earlier than it would, so that it is full where the class is large enough.
  int top, left;

  NATTEN_EXT_DEVICE NarrowTile(const NarrowParams& p, int head, int index) : head(head) {
    const auto split = [&](const Divisor& by, int divisor) {
      const int quotient = by(index), remainder = index - quotient * divisor;
      index = quotient;
      return remainder;
    };
    top = left = 0;
    if constexpr (Whole) {
      residue_x = split(p.by_tiles_x, p.tiles_x) * kClasses;
    } else {
      left = split(p.by_tiles_x, p.tiles_x) * kWidth;
      top = split(p.by_tiles_y, p.tiles_y) * kHeight;
      residue_x = split(p.by_dilation_x, p.dilation_x);
    }
    residue_y = split(p.by_dilation_y, p.dilation_y);
    batch = index;
    height = p.by_dilation_y(p.height + p.dilation_y - 1 - residue_y);
    width = class_width(p, residue_x);
    exists = Whole || (top < height && left < width);
    top = lesser(top, greater(height - kHeight, 0));
    left = lesser(left, greater(width - kWidth, 0));
  }
  // The first query that no other tile has: tiles would begin at multiples of their extent.
  NATTEN_EXT_DEVICE int own_top() const { return (top + kHeight - 1) & ~(kHeight - 1); }
  NATTEN_EXT_DEVICE int own_left() const { return (left + kWidth - 1) & ~(kWidth - 1); }
  NATTEN_EXT_DEVICE static int class_width(const NarrowParams& p, int residue) {
    return p.by_dilation_x(p.width + p.dilation_x - 1 - residue);
  }

  // The place of a chunk of the head's rows in a tensor, at its first position.
  NATTEN_EXT_DEVICE uint64_t origin(const ByteRows& t, uint32_t chunk) const {
    return forget(advanced(advanced(reinterpret_cast<uint64_t>(t.data) + 16 * chunk, batch, t.batch), head, t.head));
  }
  // Positions of the map.
  NATTEN_EXT_DEVICE int map_y(const NarrowParams& p, int y) const { return y * p.dilation_y + residue_y; }
  NATTEN_EXT_DEVICE int map_x(const NarrowParams& p, int x, int residue) const { return x * p.dilation_x + residue; }

  // Where a chunk of a row lies: chunks change places so that those of eight adjacent rows lie in different banks. The
  // places of chunks c and c ^ d differ by `^ 16 * d`, and those of slots eight further by 8 * kBytes.
  NATTEN_EXT_DEVICE static Shared place(uint32_t slot, uint32_t chunk) {
    return slot * kBytes + ((chunk ^ slot * kChunks / 8 % kChunks) * 16);
  }
};

// A warp's group of queries.
template <int Dim, bool Whole>
struct NarrowGroup {
  using Tile = NarrowTile<Dim, Whole>;
  static constexpr int kFrameRows = Whole ? kNarrowKernel : kNarrowKernel + 1;

  int residue_x, width;  // of its class
  int y, x;              // its first query
  int own_y, own_x;      // the first query that no other group has
  int window_y;          // where the windows of its first row begin
  bool lower;            // those of its second row begin one row lower
  uint32_t frame;        // slot of the frame's first position
  uint32_t own_key;      // and of the key at the place of its first query

  NATTEN_EXT_DEVICE NarrowGroup(const NarrowParams& p, const Tile& tile, int i) {
    const uint32_t number = narrow_thread() / kWarp + kNarrowWarps * i;
    const int of_class = Whole ? number / 4 : 0, down = Whole ? number % 4 : number / 2, across = Whole ? 0 : number % 2;
    residue_x = tile.residue_x + of_class;
    width = Whole ? Tile::class_width(p, residue_x) : tile.width;
    own_y = greater(tile.own_top(), tile.top + 2 * down);
    own_x = residue_x < p.dilation_x ? greater(tile.own_left(), tile.left + 8 * across) : width;
    y = lesser(tile.top + 2 * down, tile.height - 2);
    x = Whole ? 0 : lesser(tile.left + 8 * across, greater(width - 8, 0));
    window_y = class_window_start(y, tile.height, kNarrowKernel);
    lower = !Whole && class_window_start(y + 1, tile.height, kNarrowKernel) != window_y;
    const auto slot = [&](int row) {
      return (of_class * Tile::kRows + (Whole ? row : row - tile.top + Tile::kReach)) * Tile::kColumns + x - tile.left;
    };
    frame = slot(window_y);
    own_key = slot(y) + (Whole ? 0 : Tile::kReach);
  }
  NATTEN_EXT_DEVICE bool empty() const { return own_y > y + 1 || own_x >= lesser(x + 8, width); }
  // Whether queries of the upper (h = 0) or lower row have frame row r.
  NATTEN_EXT_DEVICE bool has(int r, int h) const {
    const int first = h == 1 && lower ? 1 : 0;
    return r >= first && r < first + kNarrowKernel;
  }
  // The eighth frame row is the lower queries' alone.
  NATTEN_EXT_DEVICE static constexpr bool may_have(int r, int h) { return r < kNarrowKernel || h == 1; }
  // Whether the query in row (0 to 15) of the group exists, and no other group has it.
  NATTEN_EXT_DEVICE bool owns(uint32_t row) const {
    const int column = x + row % 8;
    return y + static_cast<int>(row / 8) >= own_y && column >= own_x && column < width;
  }

  // Calls `use(row, address in the tensor, place in shared memory)` for the lane's chunks of the group's rows, as far as they
  // exist. `slot`: of the first.
  template <class Use>
  NATTEN_EXT_DEVICE void for_each_chunk(const NarrowParams& p, const Tile& tile, const ByteRows& t, uint32_t slot, Use use) const {
    constexpr uint32_t kRowsAtATime = kWarp / Tile::kChunks;
    const uint32_t first = narrow_lane() / Tile::kChunks, chunk = narrow_lane() % Tile::kChunks;
    if (kRowsAtATime > kWarpRows && first >= kWarpRows) return;
    const uint64_t origin = tile.origin(t, chunk);
    const Shared at = Tile::kOwn + Tile::place(slot + first, chunk);
    NATTEN_EXT_UNROLL
    for (uint32_t k = 0; k < kWarpRows; k += kRowsAtATime) {
      const uint32_t row = first + k;
      const int map_y = tile.map_y(p, y + row / 8), map_x = tile.map_x(p, x + row % 8, residue_x);
      use(row, 16 * chunk < p.head_bytes, advanced(advanced(origin, map_y, t.y), map_x, t.x), at + k * Tile::kBytes);
    }
  }
  // Starts the copies of its rows of a tensor; zeros for those beyond the map or, if `own_only`, that another group has.
  NATTEN_EXT_DEVICE void stage(const NarrowParams& p, const Tile& tile, const ByteRows& t, uint32_t slot, bool own_only) const {
    for_each_chunk(p, tile, t, slot, [&](uint32_t row, bool exists, uint64_t from, Shared to) {
      const bool wanted = own_only ? owns(row) : inside(x + static_cast<int>(row % 8), width);
      copy_async<16>(to, reinterpret_cast<const void*>(from), exists && wanted);
    });
  }
  // Writes `factor` times results of the lane's rows, by way of shared memory, where nobody needs its rows from `slot` on
  // any more: so they leave in 16 bytes at a time.
  template <class Element>
  NATTEN_EXT_DEVICE void write(const float (&acc)[Dim / 8][4], const float (&factor)[2], const NarrowParams& p, const Tile& tile,
                               const ByteRows& t, uint32_t slot) const {
    const uint32_t lane = narrow_lane();
    sync_warp();
    NATTEN_EXT_UNROLL
    for (int h = 0; h < 2; ++h) {
      const Shared row = Tile::kOwn + Tile::place(slot + lane / 4 + 8 * h, 0) + lane % 4 * 4;
      NATTEN_EXT_UNROLL
      for (int n = 0; n < Dim / 8; ++n) {
        store_shared(row ^ 16 * n, pack<Element>(acc[n][2 * h] * factor[h], acc[n][2 * h + 1] * factor[h]));
      }
    }
    sync_warp();
    for_each_chunk(p, tile, t, slot, [&](uint32_t row, bool exists, uint64_t to, Shared from) {
      if (exists && owns(row)) store_global(to, load_shared<Vector16>(from));
    });
  }
  // Index of a row into (batch, heads, queries).
  NATTEN_EXT_DEVICE uint64_t row_index(const NarrowParams& p, const Tile& tile, uint32_t row) const {
    const uint32_t position = tile.map_y(p, y + row / 8) * p.width + tile.map_x(p, x + row % 8, residue_x);
    return multiply_add_wide(tile.batch * p.heads + tile.head, p.height * p.width, position);
  }
};

// Copies part of a column of keys and of values: the thread's chunk of every `Apart`-th row. Zeros where the map ends.
template <int Apart, int Dim, bool Whole>
NATTEN_EXT_DEVICE void stage_narrow_column(const NarrowParams& p, const NarrowTile<Dim, Whole>& tile, uint64_t keys, uint64_t values,
                                           uint32_t slot, uint32_t chunk, int first_row, int map_x) {
  using Tile = NarrowTile<Dim, Whole>;
  const bool exists = inside(map_x, p.width) && 16 * chunk < p.head_bytes;
  const uint64_t key = advanced(keys, map_x, p.key.x), value = advanced(values, map_x, p.value.x);
  const Shared to = Tile::place(slot, chunk);
  const int first = Whole ? first_row : first_row + tile.top - Tile::kReach;
  NATTEN_EXT_UNROLL
  for (int row = 0; row < Tile::kRows; row += Apart) {
    if (row + Apart > Tile::kRows && first_row + row >= Tile::kRows) break;
    const int map_y = tile.map_y(p, first + row);
    const bool valid = exists && inside(map_y, p.height);
    const Shared at = to + row * Tile::kColumns * Tile::kBytes;
    copy_async<16>(Tile::kKeys + at, reinterpret_cast<const void*>(advanced(key, map_y, p.key.y)), valid);
    copy_async<16>(Tile::kValues + at, reinterpret_cast<const void*>(advanced(value, map_y, p.value.y)), valid);
  }
}

// Starts the copies of a tile's keys and values. A thread has columns of its own, so that only rows change.
template <int Dim, bool Whole>
NATTEN_EXT_DEVICE void stage_narrow_keys(const NarrowParams& p, const NarrowTile<Dim, Whole>& tile) {
  using Tile = NarrowTile<Dim, Whole>;
  constexpr uint32_t kPositions = kNarrowWarps * kWarp / Tile::kChunks;  // at a time
  const uint32_t chunk = narrow_thread() % Tile::kChunks, position = narrow_thread() / Tile::kChunks;
  const uint64_t keys = tile.origin(p.key, chunk), values = tile.origin(p.value, chunk);
  if constexpr (Whole) {
    NATTEN_EXT_UNROLL
    for (uint32_t slot = position; slot < Tile::kSlots; slot += kPositions) {
      const int row = slot / 8 % 8, map_x = tile.map_x(p, slot % 8, tile.residue_x + slot / 64);
      stage_narrow_column<8>(p, tile, keys, values, slot, chunk, row, map_x);
    }
  } else {
    const auto columns = [&]<uint32_t First, uint32_t Count>() {
      const uint32_t row = position / Count, column = First + position % Count;
      const int map_x = tile.map_x(p, tile.left - Tile::kReach + static_cast<int>(column), tile.residue_x);
      stage_narrow_column<kPositions / Count>(p, tile, keys, values, row * Tile::kColumns + column, chunk, row, map_x);
    };
    columns.template operator()<0, 16>();
    columns.template operator()<16, 8>();
  }
}

// A table in shared memory, times log2(e), with columns of minus infinity for what no query attends. The same without a
// table, as one of zeros. A barrier must follow.
template <class Element, class Tile>
NATTEN_EXT_DEVICE void fill_narrow_table(const NarrowParams& p, int head) {
  constexpr uint32_t kExtent = 2 * kNarrowKernel - 1;
  static_assert(kExtent * Tile::kTableRow <= kNarrowWarps * kWarp, "a thread has one entry");
  const uint32_t y = narrow_thread() / Tile::kTableRow, x = narrow_thread() % Tile::kTableRow;
  if (y >= kExtent) return;
  float value = x < kExtent ? 0 : -kInfinity<float>;
  if (p.bias.data != nullptr && x < kExtent) {
    value = kLog2E<float> * bounded(table_entry<Element, float>(p.bias, head * p.bias.head + y * p.bias.y + x * p.bias.x));
  }
  store_shared(Tile::kTable + narrow_thread() * static_cast<Shared>(sizeof(float)), value);
}

}  // namespace natten_ext::cuda
