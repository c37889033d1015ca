// Sums of dS in shared memory for the gradient of a table, of grids of 16 x 16 windows whose warps have two rows of 16 positions each
// (grid_backward.cu, grid_wide_backward.cu).
//
// All pairs of a row of keys with a row of queries have the same vertical offset. Of each offset there are sums of pairs that have the same
// place in a lane: a matrix of 24 x 8, of staged positions relative to own ones' half of a row, or the other way round. Its diagonals are
// summed at the end.
#pragma once

#include "grid.h"

namespace natten_ext::cuda {

// `ByKey`: own positions are keys, and staged ones queries. `Begin`: where the sums lie.
template <class Tile, bool ByKey, Shared Begin>
struct GridDiagonals {
  static constexpr int kExtent = Tile::kTableExtent;
  struct alignas(8) Pair {
    float e[2];
  };
  static constexpr Shared kPart = kWarp * sizeof(Pair), kBytes = 3 * kPart;  // of a vertical offset
  static constexpr Shared kEnd = Begin + kExtent * kBytes;
  Shared at;  // where those of the offset lie that is met next
  // Of keys half a row to the left of the queries' half, in the same, and to the right.
  Pair parts[3] = {};

  NATTEN_EXT_DEVICE explicit GridDiagonals(int first_own_row)
      : at(Begin + narrow_lane() * static_cast<Shared>(sizeof(Pair)) + (kGridWindow - 1 + (ByKey ? 1 : -1) * (first_own_row + 1)) * kBytes) {}

  // Adds the pairs of a warp's two own rows with a staged row, in order. Of two own rows one is as far from a staged row as the other was
  // from the row before, whose sums are carried on. In two steps, the first of an even row, each vertical offset is one warp's alone.
  // `starts`: sums need not be there yet.
  NATTEN_EXT_DEVICE void add(const float (&gradients)[2][2][4], bool starts = false) {
    Pair more[3];
    take(more, gradients[1]);
    NATTEN_EXT_UNROLL
    for (int i = 0; i < 6; ++i) parts[i / 2].e[i % 2] += more[i / 2].e[i % 2];
    store(starts);
    take(parts, gradients[0]);
  }
  // After the last row.
  NATTEN_EXT_DEVICE void add_last(bool starts = false) { store(starts); }

  // The block's threads clear all sums.
  NATTEN_EXT_DEVICE static void clear() {
    for (Shared at = Begin + narrow_thread() * 16; at < kEnd; at += Tile::kThreads * 16) store_shared(at, Vector16{});
  }
  // Calls `use(entry)` for a thread's entries of the table.
  template <class Use>
  NATTEN_EXT_DEVICE static void for_each_entry(Use use) {
    NATTEN_EXT_UNROLL
    for (int first = 0; first < kExtent * kExtent; first += Tile::kThreads) {
      const int entry = first + thread_index();
      if (entry < kExtent * kExtent) use(entry);
    }
  }
  // The same for other entries, with their sums: `use(entry, sum)`. A lane has a column, whose diagonals lie in the same places of all rows.
  template <class Use>
  NATTEN_EXT_DEVICE static void for_each_sum(Use use) {
    const int column = static_cast<int>(narrow_lane());
    if (column >= kExtent) return;
    NATTEN_EXT_NO_UNROLL
    for (int row = static_cast<int>(narrow_thread() / kWarp); row < kExtent; row += Tile::kWarps) {
      float sum = 0;
      NATTEN_EXT_UNROLL
      for (int query = 0; query < 8; ++query) {
        const int key = column - kGridWindow + 1 + query + 8;
        const int place = ByKey ? key * 8 + query : key / 8 * 64 + query * 8 + key % 8;
        if (inside(key, 24)) sum += load_shared<float>(Begin + row * kBytes + place * static_cast<int>(sizeof(float)));
      }
      use(row * kExtent + column, sum);
    }
  }
  // Where a block leaves its sums.
  NATTEN_EXT_DEVICE static float* partials(const NarrowParams& p) {
    return static_cast<float*>(p.table_partials) + (int64_t{narrow_block_of_head(p)} * p.launch_heads + narrow_launch_head(p)) * kExtent * kExtent;
  }

 private:
  // Of halves of a row of keys by halves of a row of queries, the two on the diagonal have the same offsets.
  NATTEN_EXT_DEVICE static void take(Pair (&of)[3], const float (&gradients)[2][4]) {
    NATTEN_EXT_UNROLL
    for (int e = 0; e < 2; ++e) {
      of[0].e[e] = gradients[ByKey ? 1 : 0][ByKey ? e : 2 + e];
      of[1].e[e] = gradients[0][e] + gradients[1][2 + e];
      of[2].e[e] = gradients[ByKey ? 0 : 1][ByKey ? 2 + e : e];
    }
  }
  NATTEN_EXT_DEVICE void store(bool starts) {
    NATTEN_EXT_UNROLL
    for (int i = 0; i < 3; ++i) {
      Pair sum{{0, 0}};
      if (!starts) sum = load_shared<Pair>(at + i * kPart);
      sum.e[0] += parts[i].e[0], sum.e[1] += parts[i].e[1];
      store_shared(at + i * kPart, sum);
    }
    at += ByKey ? Shared{0} - kBytes : kBytes;
  }
};

}  // namespace natten_ext::cuda
