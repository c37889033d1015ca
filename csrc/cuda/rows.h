// Numbers and corrections per own row.
#pragma once

#include "kernel.h"

namespace natten_ext::cuda {

// What a (batch, heads, queries) array has for the lane's two rows; 0 for rows that do not exist.
template <class Real>
struct RowNumbers {
  Real value[2];
  NATTEN_EXT_DEVICE RowNumbers(const Params& p, const void* source, const Tile<false>& tile, const OwnRows<false>& own) {
    for (int h = 0; h < 2; ++h) {
      value[h] = 0;
      if (own.exists[h]) {
        value[h] = load_global(static_cast<const Real*>(source) + tile.row_index(p, own.y[h], own.x));
      }
    }
  }
  NATTEN_EXT_DEVICE Real operator[](int h) const { return value[h]; }
};

template <class Real>
NATTEN_EXT_DEVICE void write_row_numbers(const Params& p, void* to, const Tile<false>& tile, const OwnRows<false>& own,
                                         const Real (&value)[2]) {
  for (int h = 0; h < 2; ++h) {
    if (thread_index() % 4 == 0 && own.exists[h]) {
      store_global(static_cast<Real*>(to) + tile.row_index(p, own.y[h], own.x), value[h]);
    }
  }
}

// Sums of a row are spread over the four lanes that have its columns.
template <class Real>
NATTEN_EXT_DEVICE void add_over_columns(Real (&sum)[2]) {
  NATTEN_EXT_UNROLL
  for (int h = 0; h < 2; ++h) {
    sum[h] += shuffle_xor(sum[h], 1);
    sum[h] += shuffle_xor(sum[h], 2);
  }
}

// acc -= factor * row, for channels `first` and on of the own rows of a tile.
template <class M, int D, int DC, class Own>
NATTEN_EXT_DEVICE void subtract_rows(typename M::Real (&acc)[DC / 8][4], const typename M::Real (&factor)[2], Shared tile,
                                     const Own& own, int first) {
  using Element = typename M::Element;
  const int lane = thread_index() % kWarp;
  NATTEN_EXT_UNROLL
  for (int n = 0; n < DC / 8; ++n) {
    NATTEN_EXT_UNROLL
    for (int e = 0; e < 4; ++e) {
      const int channel = first + 8 * n + lane % 4 * 2 + e % 2;
      const Shared at = tile + own.slot_of(lane / 4 + 8 * (e / 2)) * kPitch<M, D> + channel * static_cast<uint32_t>(sizeof(Element));
      acc[n][e] = fused_multiply_add(-factor[e / 2], widen(load_shared<Element>(at)), acc[n][e]);
    }
  }
}

}  // namespace natten_ext::cuda
