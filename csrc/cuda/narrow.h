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

// A tensor (batch, y, x, head, channel); strides count bytes.
struct ByteRows {
  unsigned char* data;
  uint32_t batch, head, y, x;
};

struct NarrowParams {
  ByteRows query, key, value, output, grad_output, cot_query, cot_key, cot_value;
  ByteRows grad_query, grad_key, grad_value, grad_grad_output;
  ByteRows row_numbers;  // those of rows.h
  Table bias;  // from the entry of the farthest key up and to the left on
  void *base, *log_sum, *natural_lse, *grad_lse, *grad_grad_lse;  // as in Params
  void* table_partials;  // (blocks_per_head, launch_heads, table_rows, table_columns) in float; null: not wanted
  int table_rows, table_columns;
  float scale, factor, inverse_factor;  // factor: the scale times log2(e)
  // The log-sum-exp comes off scores before these are scaled, where it is not larger than this (in base 2): the error is that of a float
  // of this size.
  float most_log_sum;
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

// Numbers that parts of `Element` can be summed to (narrow_numbers.h).
template <class Element>
constexpr float kMostInParts = std::is_same_v<Element, Half> ? 32768.0f : 1e30f;

// What a block of `Warps` works on, `Groups` each, and where things lie in its shared memory.
template <int Dim, bool Whole, int Warps = 8, int Groups = Dim <= 16 ? 4 : 2>
struct NarrowTile {
  static constexpr int kDim = Dim, kWarps = Warps, kGroups = Groups, kThreads = Warps * kWarp;
  static constexpr bool kWhole = Whole;
  static constexpr int kReach = kNarrowKernel / 2;
  static constexpr int kClasses = Whole ? Warps * Groups / 4 : 1;                       // side by side
  static constexpr int kHeight = Whole ? 8 : Warps * Groups, kWidth = Whole ? 8 : 16;       // of queries
  static constexpr int kRows = Whole ? 8 : kHeight + kNarrowKernel - 1, kColumns = Whole ? 8 : kWidth + 8;  // of staged keys
  static constexpr int kSlots = kClasses * kRows * kColumns;
  static constexpr uint32_t kChunks = Dim / 8, kBytes = 16 * kChunks;  // of a row: chunks of 16 bytes
  static constexpr int kTableExtent = 2 * kNarrowKernel - 1, kTableRow = 16;  // entries; from kTableExtent on minus infinity
  static constexpr Shared kTableBytes = (kTableExtent + 1) * kTableRow * sizeof(float);
  // Regions begin at multiples of 128 bytes. Past the last values is room for a frame's eighth row, which is loaded but not
  // used where whole classes have none. From kOwn on are a kernel's own rows. Key-centred kernels have queries for keys, and
  // gradients of outputs for values.
  static constexpr Shared kKeys = 0, kValues = kSlots * kBytes, kTable = kValues + (kSlots + 8) * kBytes, kOwn = kTable + kTableBytes;

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
  // The first position that is the tile's own. What two tiles have is the first one's, but for the last `Earlier` positions.
  template <int Earlier>
  NATTEN_EXT_DEVICE int own_top() const { return own_begin<kHeight, Earlier>(top); }
  template <int Earlier>
  NATTEN_EXT_DEVICE int own_left() const { return own_begin<kWidth, Earlier>(left); }
  // And the first that is another's again.
  template <int Earlier>
  NATTEN_EXT_DEVICE int own_bottom() const { return own_end<kHeight, Earlier>(top, height); }
  template <int Earlier>
  NATTEN_EXT_DEVICE int own_right() const { return own_end<kWidth, Earlier>(left, width); }
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
  NATTEN_EXT_DEVICE static Shared further(Shared place, uint32_t chunks) { return place ^ 16 * chunks; }

 private:
  // Where a tile would begin that does begin there, or earlier so that it is full.
  template <int Extent>
  NATTEN_EXT_DEVICE static int nominal(int begin) {
    return (begin + Extent - 1) & ~(Extent - 1);
  }
  template <int Extent, int Earlier>
  NATTEN_EXT_DEVICE static int own_begin(int begin) {
    return Earlier > 0 ? greater(begin, nominal<Extent>(begin) - Earlier) : nominal<Extent>(begin);
  }
  template <int Extent, int Earlier>
  NATTEN_EXT_DEVICE static int own_end(int begin, int length) {
    const int next = nominal<Extent>(begin) + Extent;
    return Whole || next >= length ? length : lesser(next, greater(length - Extent, next - Earlier));
  }
};

// A warp's group of queries; `ByKey`: of keys. Near borders keys are seen by more queries: then not both of two tiles, or groups,
// that have a key have all of these. What `ByKey` says about who owns it sees to that.
template <class Tile, bool ByKey = false>
struct NarrowGroup {
  static constexpr bool Whole = Tile::kWhole;
  static constexpr int kFrameRows = Whole ? kNarrowKernel : kNarrowKernel + 1;

  int of_class;          // which of the tile's
  int residue_x, width;  // of its class
  int y, x;              // its first query
  int own_y, own_x;      // the first query that is its own and no other group's
  int end_y, end_x;      // and where those end; end_y is of keys only
  int window_y;          // where the windows of its first row begin
  bool lower;            // those of its second row begin one row lower
  uint32_t frame;        // slot of the frame's first position
  uint32_t own_key;      // and of the key at the place of its first query

  NATTEN_EXT_DEVICE NarrowGroup(const NarrowParams& p, const Tile& tile, int i) {
    const uint32_t number = narrow_thread() / kWarp + Tile::kWarps * i;
    const int down = Whole ? number % 4 : number / 2, across = Whole ? 0 : number % 2;
    of_class = Whole ? number / 4 : 0;
    residue_x = tile.residue_x + of_class;
    width = Whole ? Tile::class_width(p, residue_x) : tile.width;
    y = lesser(tile.top + 2 * down, tile.height - 2);
    x = Whole ? 0 : lesser(tile.left + 8 * across, greater(width - 8, 0));
    constexpr int kEarlier = ByKey ? Tile::kReach : 0;
    // Between two groups side by side. Of 14 columns the eighth key has queries beyond the first group's frame.
    const int seam = ByKey && width == 2 * kNarrowKernel ? 7 : 8, own_left = tile.template own_left<kEarlier>();
    own_y = greater(tile.template own_top<kEarlier>(), tile.top + 2 * down);
    own_x = Whole && residue_x >= p.dilation_x ? width : across != 0 ? greater(own_left, tile.left + seam) : own_left;
    end_y = tile.template own_bottom<kEarlier>();
    end_x = !ByKey || Whole ? width : across != 0 ? tile.template own_right<kEarlier>() : lesser(tile.template own_right<kEarlier>(), tile.left + seam);
    window_y = class_window_start(y, tile.height, kNarrowKernel);
    lower = !Whole && class_window_start(y + 1, tile.height, kNarrowKernel) != window_y;
    frame = frame_from(tile, window_y);
    own_key = frame_from(tile, y) + (Whole ? 0 : Tile::kReach);
  }
  // Slot of the first position of a frame that begins at row `row`.
  NATTEN_EXT_DEVICE uint32_t frame_from(const Tile& tile, int row) const {
    return (of_class * Tile::kRows + (Whole ? row : row - tile.top + Tile::kReach)) * Tile::kColumns + x - tile.left;
  }
  NATTEN_EXT_DEVICE bool empty() const { return own_y > y + 1 || (ByKey && y >= end_y) || own_x >= lesser(x + 8, end_x); }
  // Whether queries of the upper (h = 0) or lower row have frame row r.
  NATTEN_EXT_DEVICE bool has(int r, int h) const {
    const int first = h == 1 && lower ? 1 : 0;
    return r >= first && r < first + kNarrowKernel;
  }
  // The eighth frame row is the lower queries' alone.
  NATTEN_EXT_DEVICE static constexpr bool may_have(int r, int h) { return r < kNarrowKernel || h == 1; }
  NATTEN_EXT_DEVICE bool owns(uint32_t row) const {
    const int own_row = y + row / 8, column = x + row % 8;
    return own_row >= own_y && (!ByKey || own_row < end_y) && column >= own_x && column < end_x;
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
  // Starts the copies of its rows of a tensor; zeros for those beyond the map.
  NATTEN_EXT_DEVICE void stage(const NarrowParams& p, const Tile& tile, const ByteRows& t, uint32_t slot) const {
    for_each_chunk(p, tile, t, slot, [&](uint32_t row, bool exists, uint64_t from, Shared to) {
      copy_async<16>(to, reinterpret_cast<const void*>(from), exists && inside(x + static_cast<int>(row % 8), width));
    });
  }
  // Writes `factor` times results of the lane's rows, by way of shared memory, where nobody needs its rows from `slot` on
  // any more: so they leave in 16 bytes at a time.
  template <class Element>
  NATTEN_EXT_DEVICE void write(const float (&acc)[Tile::kChunks][4], const float (&factor)[2], const NarrowParams& p, const Tile& tile,
                               const ByteRows& t, uint32_t slot) const {
    const uint32_t lane = narrow_lane();
    sync_warp();
    NATTEN_EXT_UNROLL
    for (int h = 0; h < 2; ++h) {
      const Shared row = Tile::kOwn + Tile::place(slot + lane / 4 + 8 * h, 0) + lane % 4 * 4;
      NATTEN_EXT_UNROLL
      for (int n = 0; n < static_cast<int>(Tile::kChunks); ++n) {
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

// Starts the copies of a tile's halo in tensors whose rows have `Chunks` chunks of 16 bytes, of which `row_bytes` exist, each to
// its region. A thread has columns of its own, so that only rows change. Zeros where the map ends.
template <uint32_t Chunks, class Tile, int Count>
NATTEN_EXT_DEVICE void stage_narrow_halo(const NarrowParams& p, const Tile& tile, const ByteRows* const (&tensors)[Count],
                                         const Shared (&regions)[Count], uint32_t row_bytes) {
  constexpr bool Whole = Tile::kWhole;
  using Rows = NarrowTile<8 * Chunks, Whole>;
  constexpr uint32_t kPositions = Tile::kThreads / Chunks;  // at a time
  const uint32_t chunk = narrow_thread() % Chunks, position = narrow_thread() / Chunks;
  uint64_t origins[Count];
  NATTEN_EXT_UNROLL
  for (int i = 0; i < Count; ++i) origins[i] = tile.origin(*tensors[i], chunk);
  // Every `Apart`-th row of a column.
  const auto column = [&]<int Apart>(uint32_t slot, int first_row, int map_x) {
    const bool exists = inside(map_x, p.width) && 16 * chunk < row_bytes;
    uint64_t from[Count];
    NATTEN_EXT_UNROLL
    for (int i = 0; i < Count; ++i) from[i] = advanced(origins[i], map_x, tensors[i]->x);
    const Shared to = Rows::place(slot, chunk);
    const int first = Whole ? first_row : first_row + tile.top - Tile::kReach;
    NATTEN_EXT_UNROLL
    for (int row = 0; row < Tile::kRows; row += Apart) {
      if (row + Apart > Tile::kRows && first_row + row >= Tile::kRows) break;
      const int map_y = tile.map_y(p, first + row);
      const bool valid = exists && inside(map_y, p.height);
      NATTEN_EXT_UNROLL
      for (int i = 0; i < Count; ++i) {
        copy_async<16>(regions[i] + to + row * Tile::kColumns * Rows::kBytes,
                       reinterpret_cast<const void*>(advanced(from[i], map_y, tensors[i]->y)), valid);
      }
    }
  };
  if constexpr (Whole) {
    NATTEN_EXT_UNROLL
    for (uint32_t slot = position; slot < Tile::kSlots; slot += kPositions) {
      column.template operator()<8>(slot, slot / 8 % 8, tile.map_x(p, slot % 8, tile.residue_x + slot / 64));
    }
  } else {
    const auto columns = [&]<uint32_t First, uint32_t Width>() {
      const uint32_t row = position / Width, x = First + position % Width;
      const int map_x = tile.map_x(p, tile.left - Tile::kReach + static_cast<int>(x), tile.residue_x);
      column.template operator()<kPositions / Width>(row * Tile::kColumns + x, row, map_x);
    };
    columns.template operator()<0, 16>();
    columns.template operator()<16, 8>();
  }
}

template <class Tile>
NATTEN_EXT_DEVICE void stage_narrow_keys(const NarrowParams& p, const Tile& tile) {
  stage_narrow_halo<Tile::kChunks>(p, tile, {&p.key, &p.value}, {Tile::kKeys, Tile::kValues}, p.head_bytes);
}

// An entry of a table in shared memory, in rows of Tile::kTableRow; past the last row too: times log2(e), and minus infinity for what
// no query attends. Without a table zeros.
template <class Element, class Tile>
NATTEN_EXT_DEVICE float narrow_table_entry(const NarrowParams& p, int head, int y, int x) {
  if (!inside(y, Tile::kTableExtent) || !inside(x, Tile::kTableExtent)) return -kInfinity<float>;
  if (p.bias.data == nullptr) return 0;
  return kLog2E<float> * bounded(table_entry<Element, float>(p.bias, head * p.bias.head + y * p.bias.y + x * p.bias.x));
}

// Calls `use(i)` for the thread's entries of `Rows` rows of a table.
template <class Tile, int Rows, class Use>
NATTEN_EXT_DEVICE void for_each_table_entry(Use use) {
  NATTEN_EXT_UNROLL
  for (uint32_t round = 0; round < Rows * Tile::kTableRow; round += Tile::kThreads) {
    if (const uint32_t i = round + narrow_thread(); i < Rows * Tile::kTableRow) use(i);
  }
}

// Fills the table. A barrier must follow.
template <class Element, class Tile>
NATTEN_EXT_DEVICE void fill_narrow_table(const NarrowParams& p, int head) {
  for_each_table_entry<Tile, Tile::kTableExtent>([&](uint32_t i) {
    store_shared(Tile::kTable + i * static_cast<Shared>(sizeof(float)),
                 narrow_table_entry<Element, Tile>(p, head, i / Tile::kTableRow, i % Tile::kTableRow));
  });
}

}  // namespace natten_ext::cuda
