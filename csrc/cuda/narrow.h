// Windows of 7 x 7 keys in half precision, which most networks with neighborhood attention use: how the kernels made for
// them cut their work, stage it, and load it from shared memory. docs/cuda.md ("Narrow windows") explains why.
//
// A *group* is 2 x 8 queries, the work of a warp at a time. Their windows lie in a frame of 8 rows and two blocks of 8
// columns; where a class of a dilated map has at most 8 x 8 positions (`Whole`), in 7 rows and one block. So loops over
// keys are constant. Beyond the map a frame has zeros, which no query attends.
#pragma once

#include "kernel.h"

namespace natten_ext::cuda {

constexpr int kNarrowKernel = 7;
constexpr int kNarrowWarps = 8;

// A tensor (batch, y, x, head, channel); strides count bytes.
struct ByteRows {
  unsigned char* data;
  uint32_t batch, head, y, x;
};

struct NarrowParams {
  ByteRows query, key, value, output;
  Table bias;  // from the entry of the farthest key up and to the left on
  void *base, *log_sum, *natural_lse;
  float factor;
  uint32_t head_bytes;  // of a row
  int height, width, heads;
  int dilation_y, dilation_x;
  int tiles_y, tiles_x;  // of a class; of whole classes: those side by side
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
  // Past the last values is room for a frame's eighth row, which is loaded but not used where whole classes have none.
  static constexpr Shared kKeys = 0, kValues = kSlots * kBytes, kQueries = kValues + (kSlots + 8) * kBytes;
  static constexpr Shared kTable = kQueries + kNarrowWarps * kGroups * kWarpRows * kBytes;
  static constexpr Shared kTotal = kTable + (2 * kNarrowKernel - 1) * kTableRow * sizeof(float);

  int batch, head;
  int residue_y, residue_x;  // of the first class
  int height, width;         // of the class; of whole ones only the height is alike
  int y0, x0;                // the first query that no other tile has
  // The first query. The last tile of an axis begins earlier, so that it is full where the class is large enough.
  int top, left;

  NATTEN_EXT_DEVICE explicit NarrowTile(const NarrowParams& p) {
    int index = p.by_launch_heads(block_x());
    head = p.head[block_x() - index * p.launch_heads];
    const auto split = [&](const Divisor& by, int divisor) {
      const int quotient = by(index), remainder = index - quotient * divisor;
      index = quotient;
      return remainder;
    };
    if constexpr (Whole) {
      residue_x = split(p.by_tiles_x, p.tiles_x) * kClasses;
      y0 = x0 = 0;
    } else {
      x0 = split(p.by_tiles_x, p.tiles_x) * kWidth;
      y0 = split(p.by_tiles_y, p.tiles_y) * kHeight;
      residue_x = split(p.by_dilation_x, p.dilation_x);
    }
    residue_y = split(p.by_dilation_y, p.dilation_y);
    batch = index;
    height = p.by_dilation_y(p.height + p.dilation_y - 1 - residue_y);
    width = class_width(p, residue_x);
    top = lesser(y0, greater(height - kHeight, 0));
    left = lesser(x0, greater(width - kWidth, 0));
  }
  NATTEN_EXT_DEVICE bool empty() const { return !Whole && (y0 >= height || x0 >= width); }
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
  uint32_t queries;      // slot of its first query

  NATTEN_EXT_DEVICE NarrowGroup(const NarrowParams& p, const Tile& tile, int i) {
    const uint32_t number = narrow_thread() / kWarp + kNarrowWarps * i;
    const int of_class = Whole ? number / 4 : 0, down = Whole ? number % 4 : number / 2, across = Whole ? 0 : number % 2;
    residue_x = tile.residue_x + of_class;
    width = Whole ? Tile::class_width(p, residue_x) : tile.width;
    own_y = greater(tile.y0, tile.top + 2 * down);
    own_x = residue_x < p.dilation_x ? greater(tile.x0, tile.left + 8 * across) : width;
    y = lesser(tile.top + 2 * down, tile.height - 2);
    x = Whole ? 0 : lesser(tile.left + 8 * across, greater(width - 8, 0));
    window_y = class_window_start(y, tile.height, kNarrowKernel);
    lower = !Whole && class_window_start(y + 1, tile.height, kNarrowKernel) != window_y;
    frame = (of_class * Tile::kRows + (Whole ? window_y : window_y - tile.top + Tile::kReach)) * Tile::kColumns + x - tile.left;
    queries = number * kWarpRows;
  }
  NATTEN_EXT_DEVICE bool empty() const { return own_y > y + 1 || own_x >= lesser(x + 8, width); }
  // Whether the query in row (0 to 15) of the group exists, and no other group has it.
  NATTEN_EXT_DEVICE bool owns(uint32_t row) const {
    const int column = x + row % 8;
    return y + static_cast<int>(row / 8) >= own_y && column >= own_x && column < width;
  }

  // Calls `use(row, address in the tensor, place in shared memory, whether it exists)` for the lane's chunks of the group's rows.
  template <class Use>
  NATTEN_EXT_DEVICE void for_each_chunk(const NarrowParams& p, const Tile& tile, const ByteRows& t, Use use) const {
    constexpr uint32_t kRowsAtATime = kWarp / Tile::kChunks;
    const uint32_t first = narrow_lane() / Tile::kChunks, chunk = narrow_lane() % Tile::kChunks;
    if (kRowsAtATime > kWarpRows && first >= kWarpRows) return;
    const uint64_t origin = tile.origin(t, chunk);
    const Shared at = Tile::kQueries + Tile::place(queries + first, chunk);
    NATTEN_EXT_UNROLL
    for (uint32_t k = 0; k < kWarpRows; k += kRowsAtATime) {
      const uint32_t row = first + k;
      const int map_y = tile.map_y(p, y + row / 8), map_x = tile.map_x(p, x + row % 8, residue_x);
      use(row, advanced(advanced(origin, map_y, t.y), map_x, t.x), at + k * Tile::kBytes, 16 * chunk < p.head_bytes);
    }
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

// What a lane has of the frame: of each block and row, columns 2t and 2t + 1 (t = lane % 4) for queries g and g + 8
// (g = lane / 4), which are one column of the map. As a window is less than eight wide, a column belongs to it in one block only.
template <int Dim, bool Whole>
struct FrameColumns {
  using Tile = NarrowTile<Dim, Whole>;
  int first;       // column of the frame where the queries' windows begin
  bool second[2];  // whether the windows have the column in block 1
  bool valid[2];   // whether they have it at all
  Shared table[2]; // entries of the column in frame row 0, of the lower query

  NATTEN_EXT_DEVICE FrameColumns(const NarrowGroup<Dim, Whole>& group) {
    const uint32_t lane = narrow_lane();
    const int left = Whole ? 0 : group.x - Tile::kReach;
    const int x = lesser(group.x + static_cast<int>(lane / 4), group.width - 1);
    first = class_window_start(x, group.width, kNarrowKernel) - left;
    const int row = group.window_y - group.y + kNarrowKernel - 2;
    NATTEN_EXT_UNROLL
    for (int c = 0; c < 2; ++c) {
      const int column = frame_column(static_cast<int>(lane % 4 * 2) + c);
      second[c] = column >= 8;
      valid[c] = inside(column - first, kNarrowKernel);
      const int entry = valid[c] ? left + column - x + kNarrowKernel - 1 : 2 * kNarrowKernel - 1;
      table[c] = Tile::kTable + (row * Tile::kTableRow + entry) * static_cast<Shared>(sizeof(float));
    }
  }
  // The column of the frame that column 0 to 7 of both blocks stands for.
  NATTEN_EXT_DEVICE int frame_column(int column) const { return !Whole && column < first ? column + 8 : column; }
  // The table's entries of a frame row, for query row h.
  NATTEN_EXT_DEVICE Shared entry(int c, int row, int h) const {
    return table[c] + (row + 1 - h) * Tile::kTableRow * static_cast<Shared>(sizeof(float));
  }
};

// The frame's keys as right operands of scores: four 8 x 8 matrices at a time, one or several of which are a row.
template <int Dim, bool Whole>
struct FrameKeys {
  using Tile = NarrowTile<Dim, Whole>;
  static constexpr int kChunks = Dim / 8, kBlocks = Whole ? 1 : 2, kMatrices = kBlocks * kChunks;  // of a row
  static constexpr int kLoads = kMatrices > 4 ? kMatrices / 4 : 1, kRowsAtATime = kMatrices < 4 ? 4 / kMatrices : 1;
  Shared address;
  uint32_t words[kLoads][4];

  NATTEN_EXT_DEVICE explicit FrameKeys(uint32_t frame) {
    const uint32_t lane = narrow_lane(), matrix = lane / 8;
    const uint32_t row = matrix / kMatrices, block = matrix / kChunks % kBlocks, chunk = matrix % kChunks;
    address = Tile::kKeys + Tile::place(frame + row * Tile::kColumns + block * 8 + lane % 8, chunk);
  }
  // Loads frame row `row`, and what else comes with it.
  NATTEN_EXT_DEVICE void load(int row) {
    NATTEN_EXT_UNROLL
    for (int i = 0; i < kLoads; ++i) {
      load_matrices(words[i], address + (row * Tile::kColumns + 4 * i / kChunks * 8) * Tile::kBytes);
    }
  }
  // A chunk of 8 keys of a block, `row` rows after the one that was asked for.
  NATTEN_EXT_DEVICE uint32_t word(int row, int block, int chunk) const {
    const int matrix = (row * kBlocks + block) * kChunks + chunk;
    return words[matrix / 4][matrix % 4];
  }
};

// The frame's values as right operands of results. A product is 16 keys deep: a row of two blocks, or two rows of one.
template <int Dim, bool Whole>
struct FrameValues {
  using Tile = NarrowTile<Dim, Whole>;
  static constexpr int kChunks = Dim / 8, kSlots = Whole ? 16 : Tile::kColumns;  // kSlots: from one product's keys to the next
  static constexpr int kLoads = kChunks > 2 ? kChunks / 2 : 1, kProductsAtATime = kChunks < 2 ? 2 : 1;
  Shared address;
  uint32_t words[kLoads][4];

  NATTEN_EXT_DEVICE explicit FrameValues(uint32_t frame) {
    const uint32_t lane = narrow_lane(), matrix = lane / 8;
    const uint32_t product = matrix / 2 / kChunks, chunk = matrix / 2 % kChunks, half = matrix % 2;
    address = Tile::kValues + Tile::place(frame + product * kSlots + half * 8 + lane % 8, chunk);
  }
  NATTEN_EXT_DEVICE void load(int product) {
    NATTEN_EXT_UNROLL
    for (int i = 0; i < kLoads; ++i) load_matrices_transposed(words[i], (address ^ 32 * i) + product * kSlots * Tile::kBytes);
  }
  // Half of the keys of 8 channels, for a product not before the one that was asked for.
  NATTEN_EXT_DEVICE uint32_t word(int product, int chunk, int half) const {
    const int matrix = (product % kProductsAtATime * kChunks + chunk) * 2 + half;
    return words[matrix / 4][matrix % 4];
  }
};

}  // namespace natten_ext::cuda
