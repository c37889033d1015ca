// Relative position tables: read from shared memory where they fit, and their gradients summed without atomics.
//
// A table's gradient is the sum of score gradients over equal offsets. Each warp has a table of sums of its own (in
// shared memory, or in global memory where tables are large). It adds a block of 16 x 8 gradients by writing them to
// a scratch and letting each lane sum one diagonal: on a map row, equal offsets lie on diagonals.
#pragma once

#include <limits>

#include "pairs.h"

namespace natten_ext::cuda {

constexpr int kDiagonal = 160;  // numbers of a warp's scratch

template <class Element, class Real>
NATTEN_EXT_DEVICE Real table_entry(const Table& t, int64_t offset) {
  if (t.is_float) return load_global(static_cast<const float*>(t.data) + offset);
  return widen(load_global(static_cast<const Element*>(t.data) + offset));
}

// Finite entries beyond this count as this. In base 2 they stay finite then, and so do their sums with scores: a table full
// of the least number masks nothing, as it is the same for all keys.
template <class Real>
constexpr Real kMostOfTable = std::numeric_limits<Real>::max() / 4;

template <class Real>
NATTEN_EXT_DEVICE Real bounded(Real entry) {
  if (entry < -kMostOfTable<Real> && entry != -kInfinity<Real>) return -kMostOfTable<Real>;
  if (entry > kMostOfTable<Real> && entry != kInfinity<Real>) return kMostOfTable<Real>;
  return entry;
}

// A table of one head as a kernel reads it, times `factor`; zero where there is none, and `masked` for pairs that don't
// exist: in its shared copy, the last row and the last column of every plane.
template <class Element, class Real, bool General>
struct TableReader {
  const Params& p;
  const Table& table;
  Shared address;
  int head;
  Real factor, masked;

  // With a shared copy, a barrier must follow before `read`.
  NATTEN_EXT_DEVICE TableReader(const Params& p, const Table& t, int head, Shared at, Real factor, Real masked)
      : p(p), table(t), address(at), head(head), factor(factor), masked(masked) {
    if (!p.plan.tables_shared) return;
    const TablePlaces& places = p.table_places;
    int last = places.zero + places.masked_row + places.masked_column;
    if constexpr (General) last += p.table_planes / 2 * places.plane;
    last /= static_cast<int>(sizeof(Real));
    NATTEN_EXT_NO_UNROLL
    for (int i = thread_index(); i <= last; i += block_threads()) {
      store_shared(address + i * static_cast<uint32_t>(sizeof(Real)), entry(i));
    }
  }
  // Of heads that share a key head the `member`-th one's, where copies of all lie next to each other.
  NATTEN_EXT_DEVICE TableReader of_member(int member) const {
    TableReader reader = *this;
    if constexpr (General) {
      reader.address += member * p.shared.table_bytes;
      reader.head += member;
    }
    return reader;
  }
  // Whether it is more than zeros.
  NATTEN_EXT_DEVICE explicit operator bool() const { return masked != 0 || table.data != nullptr; }
  // The entries of a block's pairs.
  NATTEN_EXT_DEVICE void read(Real (&entries)[4], const BlockPairs<General>& pairs) const {
    if (p.plan.tables_shared) {
      NATTEN_EXT_UNROLL
      for (int e = 0; e < 4; ++e) entries[e] = load_shared<Real>(address + p.table_places.zero + pairs.place(e));
      return;
    }
    NATTEN_EXT_NO_UNROLL
    for (int e = 0; e < 4; ++e) {
      const int place = (e / 2 ? pairs.row[1] : pairs.row[0]) +
                        (General && e / 2 ? (e % 2 ? pairs.column_of(1, 1) : pairs.column_of(1, 0))
                                          : (e % 2 ? pairs.column_of(0, 1) : pairs.column_of(0, 0)));
      const Real value = entry((p.table_places.zero + place) / static_cast<int>(sizeof(Real)));
      NATTEN_EXT_UNROLL
      for (int i = 0; i < 4; ++i) entries[i] = i == e ? value : entries[i];
    }
  }

 private:
  NATTEN_EXT_DEVICE Real entry(int index) const {
    if (p.table_columns == 0) return index == 0 ? Real(0) : masked;
    int y = p.by_table_columns(index), z = 0;
    const int x = index - y * (p.table_columns + 1);
    if constexpr (General) {
      z = p.by_table_rows(y);
      y -= z * (p.table_rows + 1);
    }
    if (y == p.table_rows || x == p.table_columns) return masked;
    if (table.data == nullptr) return 0;
    int64_t offset = head * table.head + y * table.y + x * table.x;
    if constexpr (General) offset += z * table.z;
    return factor * bounded(table_entry<Element, Real>(table, offset));
  }
};

// The table number `which` of the head of a key-centred kernel, or those of all heads that share it: the first one's.
template <class Element, class Real, bool General>
NATTEN_EXT_DEVICE TableReader<Element, Real, General> tables_of_key_head(const ParamsOf<General>& p, const Table& t, int key_head,
                                                                         int which, Real factor, Real masked) {
  using Reader = TableReader<Element, Real, General>;
  if constexpr (!General) return Reader(p, t, key_head, p.shared.table(which), factor, masked);
  const int head = key_head * p.sharing, place = which * p.sharing;
  for (int member = 1; member < p.sharing; ++member) Reader(p, t, head + member, p.shared.table(place + member), factor, masked);
  return Reader(p, t, head, p.shared.table(place), factor, masked);
}

// Sums of one warp, where the launch wants them; of the blocks that share a tile's channels, the first has them.
template <class Real, bool General>
struct TableGradient {
  const Params& p;
  Shared sums, scratch;
  int place = -1;  // in the launch's array of partial sums, (partials, heads, table)

  // A barrier must follow before `add`.
  NATTEN_EXT_DEVICE TableGradient(const Params& p, int launch_head, int block_of_head)
      : p(p), sums(p.shared.gradient(thread_index() / kWarp)), scratch(p.shared.diagonal(thread_index() / kWarp)) {
    if (!p.table_gradient || block_y() != 0) return;
    const int index = p.plan.tables_shared ? block_of_head : block_of_head * p.plan.warps + thread_index() / kWarp;
    place = index * p.launch_heads + launch_head;
    for (int i = thread_index() % kWarp; i < size(); i += kWarp) {
      if (p.plan.tables_shared) store_shared(shared(i), Real(0));
      else store_global(partial(i), Real(0));
    }
  }
  NATTEN_EXT_DEVICE explicit operator bool() const { return place >= 0; }

  // Adds the gradients of a unit's pairs, 0 where there is none. `kernel`: width of the windows.
  NATTEN_EXT_DEVICE void add(const Scores<Real>& values, const OwnRows<Side<false, General>>& own, const Unit& unit, int kernel) {
    const int lane = thread_index() % kWarp, h = lane / 16;
    // Table column of column 0 and the first of the lane's h own rows of block 0, and their table row.
    const int x = p.table_columns / 2 + unit.x[0] - (own.x - lane / 4) - h * own.step_x;
    const int y = p.table_rows / 2 + unit.y[0] - own.y[0] - h * own.step_y;
    const int plane = General ? p.table_planes / 2 + unit.plane : 0;
    if (own.narrow && unit.y[0] == unit.y[1]) {
      // Both blocks at once: modulo eight, offsets are those of eight diagonals of eight. Two lanes have half of one each.
      put(values[0][0] + values[1][0], values[0][1] + values[1][1], values[0][2] + values[1][2], values[0][3] + values[1][3]);
      sync_warp();
      const int half = lane / 8 % 2, first = p.table_columns / 2 - kernel / 2;
      Real sum = 0;
      for (int i = 4 * half; i < 4 * half + 4; ++i) sum += load_shared<Real>(at(h, i, (i + lane) % 8));
      sum += shuffle_xor(sum, 8);
      const int offset = (x + lane % 8 - first) & 7;
      add_entries(half == 0 && offset < kernel, h, plane, y, first + offset, sum, own);
      return;
    }
    // Lanes 0 to 14 sum the diagonals column - row = -7 to 7 of h = 0, lanes 16 to 30 those of h = 1.
    const int diagonal = lane % 16 - 7;
    NATTEN_EXT_NO_UNROLL
    for (int b = 0; b < 2; ++b) {
      put(b ? values[1][0] : values[0][0], b ? values[1][1] : values[0][1], b ? values[1][2] : values[0][2],
          b ? values[1][3] : values[0][3]);
      sync_warp();
      Real sum = 0;
      for (int i = 0; i < 8; ++i) {
        const int column = i + diagonal;
        if (column >= 0 && column < 8 && diagonal < 8) sum += load_shared<Real>(at(h, i, column));
      }
      const int to_x = x + diagonal + (b ? unit.x[1] - unit.x[0] : 0), to_y = y + (b ? unit.y[1] - unit.y[0] : 0);
      add_entries(diagonal < 8, h, plane, to_y, to_x, sum, own);
    }
  }

  // At the end of the block.
  NATTEN_EXT_DEVICE void write_partial() {
    if (!*this || !p.plan.tables_shared) return;
    sync_block();
    for (int i = thread_index(); i < size(); i += block_threads()) {
      Real sum = 0;
      for (int warp = 0; warp < p.plan.warps; ++warp) {
        sum += load_shared<Real>(p.shared.gradient(warp) + i * static_cast<uint32_t>(sizeof(Real)));
      }
      store_global(partial(i), sum);
    }
  }

 private:
  NATTEN_EXT_DEVICE Real* partial(int i) const { return static_cast<Real*>(p.table_partials) + int64_t{place} * size() + i; }
  NATTEN_EXT_DEVICE Shared shared(int i) const { return sums + i * static_cast<uint32_t>(sizeof(Real)); }
  NATTEN_EXT_DEVICE int size() const { return (General ? p.table_planes : 1) * p.table_rows * p.table_columns; }
  // In the scratch, rows 4 to 7 of a block lie eight numbers further, so that halves of diagonals are in different banks.
  NATTEN_EXT_DEVICE Shared at(int h, int row, int column) const {
    return scratch + (80 * h + 8 * row + row / 4 * 8 + column) * static_cast<uint32_t>(sizeof(Real));
  }
  // The lane's fragment of a block.
  NATTEN_EXT_DEVICE void put(Real a, Real b, Real c, Real d) const {
    const int g = thread_index() % kWarp / 4, t = thread_index() % 4;
    struct alignas(2 * sizeof(Real)) Pair {
      Real e[2];
    };
    store_shared(at(0, g, 2 * t), Pair{{a, b}});
    store_shared(at(1, g, 2 * t), Pair{{c, d}});
  }
  // Adds the sums of lanes that have one, each to an entry of its own. In wide tiles, entries of both own rows may be the same.
  NATTEN_EXT_DEVICE void add_entries(bool has_one, int h, int z, int y, int x, Real sum, const OwnRows<Side<false, General>>& own) {
    const bool second = General && own.step_y == 0 && h == 1;
    if (has_one && !second) add_entry(z, y, x, sum);
    if (General && own.step_y == 0) {
      sync_warp();
      if (has_one && second) add_entry(z, y, x, sum);
    }
    sync_warp();
  }
  NATTEN_EXT_DEVICE void add_entry(int z, int y, int x, Real sum) {
    if (y < 0 || y >= p.table_rows || x < 0 || x >= p.table_columns) return;
    const int i = (z * p.table_rows + y) * p.table_columns + x;
    if (p.plan.tables_shared) {
      store_shared(shared(i), load_shared<Real>(shared(i)) + sum);
    } else {
      store_global(partial(i), load_global(partial(i)) + sum);
    }
  }
};

}  // namespace natten_ext::cuda
