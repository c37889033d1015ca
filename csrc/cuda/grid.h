// Grids of windows of 16 x 16 positions in half precision, as TransGAN has them: how the kernels made for them stage a window, and
// what a lane knows of a table. docs/cuda.md ("Grid windows") explains why.
//
// All queries of a window attend all of its keys, so a block has a window of one head, and nothing is masked. A *group* is 2 x 8
// queries, the work of a warp at a time, as in narrow.h; a row of keys is one frame row of two blocks of 8 columns (narrow_frame.h).
#pragma once

#include "narrow_frame.h"

namespace natten_ext::cuda {

constexpr int kGridWindow = 16;

// Where things lie in the shared memory of a block of `Warps`.
template <int Dim, int Warps>
struct GridTile {
  static constexpr int kDim = Dim, kWarps = Warps, kThreads = Warps * kWarp;
  static constexpr bool kWhole = false;
  static constexpr int kColumns = kGridWindow, kSlots = kGridWindow * kGridWindow;
  static constexpr uint32_t kChunks = Dim / 8;
  // A power of two of chunks change places, as in narrow windows. Others have an odd pitch.
  static constexpr bool kSwapped = (kChunks & (kChunks - 1)) == 0;
  static constexpr uint32_t kBytes = 16 * (kSwapped ? kChunks : kChunks | 1), kRowBytes = kColumns * kBytes;  // of a position; of a row of them
  static constexpr Shared kRegion = kSlots * kBytes;  // a window of a tensor
  static constexpr int kGroups = kSlots / kWarpRows / Warps;  // of a warp
  // The table has two copies, the second one column to the left: so two adjacent entries are always one load.
  static constexpr int kTableExtent = 2 * kGridWindow - 1;
  static constexpr Shared kTableRow = 2 * kGridWindow * sizeof(float), kShifted = kTableExtent * kTableRow + 64;
  static constexpr Shared kTableBytes = (kShifted + kTableExtent * kTableRow + 127) / 128 * 128;
  // Own rows lie from kOwn on, where narrow_frame.h looks for them.
  static constexpr Shared kKeys = 0, kValues = kRegion, kOwn = 2 * kRegion, kQueries = kOwn;

  NATTEN_EXT_DEVICE static Shared place(uint32_t slot, uint32_t chunk) {
    if constexpr (kSwapped) return NarrowTile<Dim, false>::place(slot, chunk);
    else return slot * kBytes + chunk * 16;
  }
  // From the place of a chunk to that of one `chunks` further, for the same even `chunks` of all.
  NATTEN_EXT_DEVICE static Shared further(Shared place, uint32_t chunks) { return kSwapped ? place ^ 16 * chunks : place + 16 * chunks; }
};

// A window of a head.
struct GridWindow {
  int batch, head, y, x;  // its first position

  NATTEN_EXT_DEVICE GridWindow(const NarrowParams& p, int head, int index) : head(head) {
    const int row = p.by_tiles_x(index);
    batch = p.by_tiles_y(row);
    x = (index - row * p.tiles_x) * kGridWindow;
    y = (row - batch * p.tiles_y) * kGridWindow;
  }
  // The place of a position of the window in a tensor.
  NATTEN_EXT_DEVICE uint64_t address(const ByteRows& t, int row, int column) const {
    return place(reinterpret_cast<uint64_t>(t.data), t, row, column);
  }
  // The same as a pointer, from which the compiler knows that it is one to global memory.
  NATTEN_EXT_DEVICE unsigned char* pointer(const ByteRows& t, int row, int column) const { return t.data + place(0, t, row, column); }
  // Index of a position into (batch, heads, queries).
  NATTEN_EXT_DEVICE uint64_t row_index(const NarrowParams& p, int row, int column) const {
    return multiply_add_wide(batch * p.heads + head, p.height * p.width, (y + row) * p.width + x + column);
  }

 private:
  NATTEN_EXT_DEVICE uint64_t place(uint64_t origin, const ByteRows& t, int row, int column) const {
    const uint64_t head_rows = advanced(advanced(origin, batch, t.batch), head, t.head);
    return advanced(advanced(head_rows, y + row, t.y), x + column, t.x);
  }
};

// Heads of four channels have 8 bytes, half of a chunk; all others have whole ones.
template <class Tile>
NATTEN_EXT_DEVICE bool has_half_chunks(const NarrowParams& p) {
  return Tile::kDim == 8 && p.head_bytes == 8;
}

// Starts the copies of a window of some tensors, each to its region. A thread has a chunk of a column, in every so many rows.
template <class Tile, int Count>
NATTEN_EXT_DEVICE void stage_grid_window(const NarrowParams& p, const GridWindow& window, const ByteRows* const (&tensors)[Count],
                                         const Shared (&regions)[Count]) {
  constexpr int kMost = Tile::kThreads / Tile::kChunks / kGridWindow, kApart = kMost == 3 ? 2 : kMost;  // rows at a time
  static_assert(kGridWindow % kApart == 0 || kApart > kGridWindow);
  const uint32_t chunk = narrow_thread() % Tile::kChunks, position = narrow_thread() / Tile::kChunks;
  const bool exists = 16 * chunk < p.head_bytes;
  const Shared to = Tile::place(position, chunk);
  if (position >= (kApart > kGridWindow ? Tile::kSlots : kApart * kGridWindow)) return;
  NATTEN_EXT_UNROLL
  for (int i = 0; i < Count; ++i) {
    uint64_t from = forget(window.address(*tensors[i], position / kGridWindow, position % kGridWindow) + 16 * chunk);
    NATTEN_EXT_UNROLL
    for (int row = 0; row < kGridWindow; row += kApart) {
      const Shared at = regions[i] + to + row * Tile::kRowBytes;
      if (has_half_chunks<Tile>(p)) {
        copy_async<8>(at, reinterpret_cast<const void*>(from), true);
        copy_async<8>(at + 8, reinterpret_cast<const void*>(from), false);
      } else {
        copy_async<16>(at, reinterpret_cast<const void*>(from), exists);
      }
      from = advanced(from, kApart, tensors[i]->y);
    }
  }
}

// Fills both copies of the table, from `table` on: times log2(e), zeros where there is none. A barrier must follow.
template <class Element, class Tile>
NATTEN_EXT_DEVICE void fill_grid_table(const NarrowParams& p, int head, Shared table) {
  constexpr int kRows = (Tile::kTableExtent + Tile::kWarps - 1) / Tile::kWarps;  // of a thread, in a column of its own
  const int column = static_cast<int>(narrow_lane()), first = static_cast<int>(narrow_thread() / kWarp);
  float entries[kRows];
  NATTEN_EXT_UNROLL
  for (float& entry : entries) entry = 0;
  if (p.bias.data != nullptr && column < Tile::kTableExtent) {
    const int64_t offset = head * p.bias.head + column * p.bias.x;
    // Nothing that depends on a load stands between them.
    const auto load = [&]<class Entry>() {
      Entry loaded[kRows];
      NATTEN_EXT_UNROLL
      for (int i = 0; i < kRows; ++i) {
        const int row = lesser(first + i * Tile::kWarps, Tile::kTableExtent - 1);
        loaded[i] = load_global(static_cast<const Entry*>(p.bias.data) + offset + row * p.bias.y);
      }
      NATTEN_EXT_UNROLL
      for (int i = 0; i < kRows; ++i) entries[i] = widen(loaded[i]);
    };
    if (p.bias.is_float) load.template operator()<float>();
    else load.template operator()<Element>();
  }
  const Shared to = table + first * Tile::kTableRow + column * static_cast<Shared>(sizeof(float));
  NATTEN_EXT_UNROLL
  for (int i = 0; i < kRows; ++i) {
    if (first + i * Tile::kWarps >= Tile::kTableExtent) break;
    const float entry = kLog2E<float> * bounded(entries[i]);
    store_shared(to + i * Tile::kWarps * Tile::kTableRow, entry);
    if (column > 0) store_shared(to + i * Tile::kWarps * Tile::kTableRow + Tile::kShifted - static_cast<Shared>(sizeof(float)), entry);
  }
}

// A group of 16 positions of a window: 2 x 8, or a row of it.
template <class Tile, bool Row = false>
struct GridGroup {
  int y, x;  // the first

  NATTEN_EXT_DEVICE GridGroup(int y, int x) : y(y), x(x) {}
  // The i-th of a warp of `Warps`: of one half of two rows, the same half for all, so that what a lane computes from its
  // place in a group serves all of them.
  template <int Warps>
  NATTEN_EXT_DEVICE static GridGroup of_warp(uint32_t warp, int i) {
    static_assert(Warps % 2 == 0);
    return {static_cast<int>(warp / 2) * 2 + i * Warps, static_cast<int>(warp % 2) * 8};
  }
  // Where a chunk of row 0 to 15 of the group lies in a region.
  NATTEN_EXT_DEVICE Shared place(uint32_t row, uint32_t chunk) const {
    return Tile::place(down(row) * Tile::kColumns + across(row), chunk) + x * Tile::kBytes + y * Tile::kRowBytes;
  }
  // Where lane l finds chunk l / 16 of row l % 16, as load_matrices asks for left operands.
  NATTEN_EXT_DEVICE Shared left_place() const { return place(narrow_lane() % 16, narrow_lane() / 16 % Tile::kChunks); }

  // Writes `factor` times results, by way of the group's rows in a region, where nobody needs these any more: so they
  // leave in 16 bytes at a time.
  template <class Element>
  NATTEN_EXT_DEVICE void write(const float (&acc)[Tile::kChunks][4], const float (&factor)[2], const NarrowParams& p,
                               const GridWindow& window, const ByteRows& t, Shared region) const {
    // Places are computed once for all groups, or of wide heads each time: that saves registers.
    const uint32_t lane = Tile::kDim > 32 ? static_cast<uint32_t>(forget(static_cast<int>(narrow_lane()))) : narrow_lane();
    sync_warp();
    NATTEN_EXT_UNROLL
    for (int n = 0; n < static_cast<int>(Tile::kChunks); ++n) {
      NATTEN_EXT_UNROLL
      for (int h = 0; h < 2; ++h) {
        store_shared(region + place(lane / 4 + 8 * h, n) + lane % 4 * 4, pack<Element>(acc[n][2 * h] * factor[h], acc[n][2 * h + 1] * factor[h]));
      }
    }
    sync_warp();
    constexpr uint32_t kRowsAtATime = kWarp / Tile::kChunks;
    constexpr uint32_t kRowsThere = kRowsAtATime < kWarpRows ? kRowsAtATime : kWarpRows;
    const uint32_t first = lane / Tile::kChunks, chunk = lane % Tile::kChunks;
    if (first >= kRowsThere || 16 * chunk >= p.head_bytes) return;
    const uint64_t origin = window.address(t, 0, x) + 16 * chunk;
    NATTEN_EXT_UNROLL
    for (uint32_t k = 0; k < kWarpRows; k += kRowsAtATime) {
      const uint32_t row = first + k;
      if (kWarpRows % kRowsAtATime != 0 && row >= kWarpRows) return;
      const uint64_t to = advanced(advanced(origin, across(row), t.x), y + down(row), t.y);
      const Shared from = region + place(row, chunk);
      if (has_half_chunks<Tile>(p)) store_global(reinterpret_cast<uint64_t*>(to), load_shared<uint64_t>(from));
      else store_global(to, load_shared<Vector16>(from));
    }
  }

 private:
  NATTEN_EXT_DEVICE static uint32_t down(uint32_t row) { return Row ? 0 : row / 8; }
  NATTEN_EXT_DEVICE static uint32_t across(uint32_t row) { return Row ? row : row % 8; }
};

// The table's entries of a lane's pairs, of one row of keys after the other: of blocks b, columns 2t and 2t + 1 (t = lane % 4), for the
// queries g = lane / 4 of the group's upper row. A row further, they are those of the lower row.
template <class Tile>
struct GridEntries {
  struct alignas(8) Pair {
    float e[2];
  };
  Shared address;  // of the upper row's before the first row of keys

  NATTEN_EXT_DEVICE GridEntries(const GridGroup<Tile>& group, Shared table) {
    const int lane = static_cast<int>(narrow_lane()), column = lane % 4 * 2 - (group.x + lane / 4) + kGridWindow - 1;
    const int copy = column % 2 * (static_cast<int>(Tile::kShifted) - static_cast<int>(sizeof(float)));
    address = table + (kGridWindow - 2 - group.y) * Tile::kTableRow + column * static_cast<int>(sizeof(float)) + copy;
  }
  // Those of the upper row at a row of keys, or at the one before the first (-1).
  NATTEN_EXT_DEVICE void load(Pair (&entries)[2], int row) const {
    NATTEN_EXT_UNROLL
    for (int b = 0; b < 2; ++b) entries[b] = load_shared<Pair>(address + (row + 1) * Tile::kTableRow + 8 * b * static_cast<Shared>(sizeof(float)));
  }
};

}  // namespace natten_ext::cuda
