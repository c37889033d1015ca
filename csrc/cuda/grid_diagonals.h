// Sums of dS in shared memory for the gradient of a table, of grids of 16 x 16 windows whose warps have two rows of keys each
// (grid_wide_backward.cu).
//
// All pairs of a row of keys with a row of queries have the same vertical offset. Of each offset there are sums of pairs that have the same
// place in a lane, for a window: a matrix of 24 x 8, of keys relative to the queries' half of a row, and queries of the half. Its diagonals
// are summed at the window's end.
#pragma once

#include "grid.h"

namespace natten_ext::cuda {

// `Begin`: where they lie. `Sums`: where the block's sums of all windows lie.
template <class Tile, Shared Begin, Shared Sums>
struct GridDiagonals {
  static constexpr int kExtent = Tile::kTableExtent;
  struct alignas(8) Pair {
    float e[2];
  };
  static constexpr Shared kPart = kWarp * sizeof(Pair), kBytes = 3 * kPart;  // of a vertical offset
  static constexpr Shared kEnd = Begin + kExtent * kBytes;
  // Of keys half a row to the left of the queries' half, in the same, and to the right.
  Pair parts[3] = {};

  // The second of a warp's rows of keys is as far from a row of queries as the first was from the row before, whose sums are carried on. In a
  // step each vertical offset is one warp's alone, and after the first steps all but those of the first warp have been met.
  NATTEN_EXT_DEVICE void add(const float (&gradients)[2][2][4], int first_key_row, int row) {
    add(gradients[1]);
    store(first_key_row + 1 - row, row < 2 || first_key_row == 0);
    NATTEN_EXT_UNROLL
    for (Pair& part : parts) part = {};
    add(gradients[0]);
  }
  NATTEN_EXT_DEVICE void add_last(int first_key_row) const { store(first_key_row + 1 - kGridWindow, first_key_row == 0); }

  // Calls `use(entry, its sum's place)` for a thread's entries of the table.
  template <class Use>
  NATTEN_EXT_DEVICE static void for_each_sum(Use use) {
    NATTEN_EXT_UNROLL
    for (uint32_t first = 0; first < kExtent * kExtent; first += Tile::kThreads) {
      const uint32_t entry = first + narrow_thread();
      if (entry < kExtent * kExtent) use(entry, Sums + entry * static_cast<Shared>(sizeof(float)));
    }
  }
  NATTEN_EXT_DEVICE static void clear_sums() {
    for_each_sum([](uint32_t, Shared sum) { store_shared(sum, 0.0f); });
  }
  NATTEN_EXT_DEVICE static void add_window() {
    for_each_sum([](uint32_t entry, Shared at) {
      const int right = static_cast<int>(entry % kExtent) - kGridWindow + 1;
      float sum = load_shared<float>(at);
      NATTEN_EXT_UNROLL
      for (int query = 0; query < 8; ++query) {
        const int key = right + query + 8;
        if (inside(key, 24)) sum += load_shared<float>(Begin + entry / kExtent * kBytes + (key * 8 + query) * static_cast<int>(sizeof(float)));
      }
      store_shared(at, sum);
    });
  }
  NATTEN_EXT_DEVICE static void write(const NarrowParams& p) {
    auto* to = static_cast<float*>(p.table_partials) + (int64_t{narrow_block_of_head(p)} * p.launch_heads + narrow_launch_head(p)) * kExtent * kExtent;
    for_each_sum([&](uint32_t entry, Shared sum) { store_global(to + entry, load_shared<float>(sum)); });
  }

 private:
  // Halves of a row of keys by halves of a row of queries: the two on the diagonal have the same offsets.
  NATTEN_EXT_DEVICE void add(const float (&gradients)[2][4]) {
    NATTEN_EXT_UNROLL
    for (int e = 0; e < 2; ++e) {
      parts[0].e[e] += gradients[1][e];
      parts[1].e[e] += gradients[0][e] + gradients[1][2 + e];
      parts[2].e[e] += gradients[0][2 + e];
    }
  }
  NATTEN_EXT_DEVICE void store(int down, bool is_first) const {
    const Shared at = Begin + (down + kGridWindow - 1) * kBytes + narrow_lane() * static_cast<Shared>(sizeof(Pair));
    NATTEN_EXT_UNROLL
    for (int i = 0; i < 3; ++i) {
      Pair sum{{0, 0}};
      if (!is_first) sum = load_shared<Pair>(at + i * kPart);
      sum.e[0] += parts[i].e[0], sum.e[1] += parts[i].e[1];
      store_shared(at + i * kPart, sum);
    }
  }
};

}  // namespace natten_ext::cuda
