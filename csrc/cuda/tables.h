// Relative position tables: read from shared memory where they fit, and their gradients summed without atomics.
//
// A table's gradient is the sum of score gradients over equal offsets. Each warp has a table of sums of its own (in
// shared memory, or in global memory where tables are large). It adds a block of 16 x 8 gradients by writing them to
// a scratch and letting each lane sum one diagonal: on a map row, equal offsets lie on diagonals.
#pragma once

#include "tiles.h"

namespace natten_ext::cuda {

template <class Element, class Real>
NATTEN_EXT_DEVICE Real table_entry(const Table& t, int64_t offset) {
  if (t.is_float) return load_global(static_cast<const float*>(t.data) + offset);
  return widen(load_global(static_cast<const Element*>(t.data) + offset));
}

// A table of one head as a kernel reads it, times `factor`; zero where there is none.
template <class Element, class Real>
struct TableReader {
  const Table& table;
  Shared address;
  bool shared;
  int head, columns;
  Real factor;

  // With a shared copy, a barrier must follow before `at`.
  NATTEN_EXT_DEVICE TableReader(const Params& p, const Table& t, int head, Shared at, Real factor)
      : table(t), address(at), shared(p.plan.tables_shared), head(head), columns(p.table_columns), factor(factor) {
    if (table.data == nullptr || !shared) return;
    for (int i = thread_index(); i < p.table_rows * columns; i += block_threads()) {
      store_shared(address + i * static_cast<uint32_t>(sizeof(Real)), entry(i / columns, i % columns));
    }
  }
  NATTEN_EXT_DEVICE Real entry(int y, int x) const {
    return factor * table_entry<Element, Real>(table, head * table.head + y * table.y + x * table.x);
  }
  NATTEN_EXT_DEVICE explicit operator bool() const { return table.data != nullptr; }
  NATTEN_EXT_DEVICE Real at(int y, int x) const {
    if (shared) return load_shared<Real>(address + (y * columns + x) * static_cast<uint32_t>(sizeof(Real)));
    return entry(y, x);
  }
};

// Sums of one warp. `partial`: the launch's array of partial sums, (partials, heads, table).
template <class Real>
struct TableGradient {
  Shared sums, scratch;
  Real* partial;
  bool shared;
  int rows, columns;

  // A barrier must follow before `add`.
  NATTEN_EXT_DEVICE TableGradient(const Params& p, int launch_head, int block_of_head, Shared sums, Shared scratch)
      : sums(sums), scratch(scratch), shared(p.plan.tables_shared), rows(p.table_rows), columns(p.table_columns) {
    const int index = shared ? block_of_head : block_of_head * p.plan.warps + thread_index() / kWarp;
    partial = nullptr;
    if (!p.table_gradient) return;
    partial = static_cast<Real*>(p.table_partials);
    partial += (int64_t{index} * p.launch_heads + launch_head) * rows * columns;
    for (int i = thread_index() % kWarp; i < rows * columns; i += kWarp) write(i, Real(0));
  }
  NATTEN_EXT_DEVICE explicit operator bool() const { return partial != nullptr; }

  // Adds a block whose row h and column c have offset (table_y[h], table_x[c]); values of pairs that do not exist are 0.
  NATTEN_EXT_DEVICE void add(const Real (&values)[4], const BlockPairs& pairs) {
    const int lane = thread_index() % kWarp, g = lane / 4, t = lane % 4;
    const uint32_t size = sizeof(Real);
    for (int e = 0; e < 4; ++e) store_shared(scratch + (80 * (e / 2) + 8 * g + 2 * t + e % 2) * size, values[e]);
    sync_warp();
    // Lanes 0 to 14 sum the diagonals column - g = -7 to 7 of row h = 0, lanes 16 to 30 those of row 1.
    const int h = lane / 16, diagonal = lane % 16 - 7;
    Real sum = 0;
    for (int i = 0; i < 8; ++i) {
      const int column = i + diagonal;
      if (column >= 0 && column < 8 && diagonal < 8) sum += load_shared<Real>(scratch + (80 * h + 8 * i + column) * size);
    }
    const int y = h ? pairs.table_y[1] : pairs.table_y[0];
    const int x = pairs.table_x[0] + g - 2 * t + diagonal;
    if (diagonal < 8 && y >= 0 && y < rows && x >= 0 && x < columns) write(y * columns + x, read(y * columns + x) + sum);
    sync_warp();
  }

  // At the end of the block.
  NATTEN_EXT_DEVICE void write_partial(const Params& p, Shared first_sums, Shared bytes_per_warp) {
    if (partial == nullptr || !shared) return;
    sync_block();
    for (int i = thread_index(); i < rows * columns; i += block_threads()) {
      Real sum = 0;
      for (int warp = 0; warp < p.plan.warps; ++warp) {
        sum += load_shared<Real>(first_sums + warp * bytes_per_warp + i * static_cast<uint32_t>(sizeof(Real)));
      }
      store_global(partial + i, sum);
    }
  }

 private:
  NATTEN_EXT_DEVICE Real read(int i) const {
    return shared ? load_shared<Real>(sums + i * static_cast<uint32_t>(sizeof(Real))) : load_global(partial + i);
  }
  NATTEN_EXT_DEVICE void write(int i, Real value) {
    if (shared) store_shared(sums + i * static_cast<uint32_t>(sizeof(Real)), value);
    else store_global(partial + i, value);
  }
};

}  // namespace natten_ext::cuda
