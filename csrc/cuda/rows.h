// Numbers and corrections per own row.
#pragma once

#include "kernel.h"

namespace natten_ext::cuda {

// What a (batch, heads, queries) array has for the lane's two rows; 0 for rows that do not exist, and without an array.
template <class Real>
struct RowNumbers {
  Real value[2];
  template <bool General>
  NATTEN_EXT_DEVICE RowNumbers(const Params& p, const void* source, const Tile<Side<false, General>>& tile,
                               const OwnRows<Side<false, General>>& own) {
    for (int h = 0; h < 2; ++h) {
      value[h] = 0;
      if (own.exists[h] && source != nullptr) {
        value[h] = load_global(static_cast<const Real*>(source) + own.index(p, tile, h));
      }
    }
  }
  NATTEN_EXT_DEVICE Real operator[](int h) const { return value[h]; }
};

// What query-centred kernels leave for the key-centred ones of each query, in p.row_numbers: L in two parts, D, of l2
// |q|^2 / 2; in the double backward also r, t, of l2 gQ.q, and room. From D the gradient of the log-sum-exp, y, is taken off.
enum RowNumber { kBase, kLogSum, kD, kHalfNorm, kR, kT, kCotProduct };

template <class Real>
struct alignas(16) NumberChunk {
  Real numbers[16 / sizeof(Real)];
};

// Writes those of the lane's own row h.
template <int N, class Real, bool General>
NATTEN_EXT_DEVICE void write_row_numbers(const Params& p, const Tile<Side<false, General>>& tile,
                                         const OwnRows<Side<false, General>>& own, int h, const Real (&numbers)[N]) {
  constexpr int kPerChunk = 16 / sizeof(Real);
  if (thread_index() % 4 != 0 || !own.exists[h]) return;
  auto* to = static_cast<NumberChunk<Real>*>(p.row_numbers) + own.index(p, tile, h) * (N / kPerChunk);
  NATTEN_EXT_UNROLL
  for (int i = 0; i < N / kPerChunk; ++i) {
    NumberChunk<Real> chunk;
    for (int k = 0; k < kPerChunk; ++k) chunk.numbers[k] = numbers[i * kPerChunk + k];
    store_global(to + i, chunk);
  }
}

// Those of the staged rows of a block's columns c = 0, 1.
template <class Real, int N>
struct StagedNumbers {
  static constexpr int kPerChunk = 16 / sizeof(Real);
  NumberChunk<Real> chunks[2][N / kPerChunk];

  template <bool General>
  NATTEN_EXT_DEVICE StagedNumbers(Shared at, const BlockPairs<General>& pairs) {
    NATTEN_EXT_UNROLL
    for (int i = 0; i < 2 * N / kPerChunk; ++i) {
      const int c = i / (N / kPerChunk), chunk = i % (N / kPerChunk);
      chunks[c][chunk] = load_shared<NumberChunk<Real>>(at + (pairs.slot[c] * (N / kPerChunk) + chunk) * 16);
    }
  }
  NATTEN_EXT_DEVICE Real operator()(RowNumber which, int c) const {
    return chunks[c][which / kPerChunk].numbers[which % kPerChunk];
  }
};

// Sums of a row are spread over the four lanes that have its columns.
template <class Real>
NATTEN_EXT_DEVICE void add_over_columns(Real (&sum)[2]) {
  NATTEN_EXT_UNROLL
  for (int h = 0; h < 2; ++h) {
    sum[h] += shuffle_xor(sum[h], 1);
    sum[h] += shuffle_xor(sum[h], 2);
  }
}

// |row|^2 / 2 of the lane's own rows of a tile.
template <class M, int Dim, class Own>
NATTEN_EXT_DEVICE void own_half_norms(typename M::Real (&half_norms)[2], Shared tile, const Own& own) {
  row_products<M, Dim>(half_norms, tile, tile, own);
  for (int h = 0; h < 2; ++h) half_norms[h] *= typename M::Real(0.5);
}

// acc -= total * rows, of a lane's two rows.
template <int N, class Real, class Totals>
NATTEN_EXT_DEVICE void subtract_products(Real (&acc)[N][4], const Totals& totals, const Real (&rows)[N][4]) {
  NATTEN_EXT_UNROLL
  for (int i = 0; i < N * 4; ++i) acc[i / 4][i % 4] = fused_multiply_add(-totals[i % 4 / 2], rows[i / 4][i % 4], acc[i / 4][i % 4]);
}

// acc -= total * row, for channels `first` and on of a warp's rows of a tile.
//
// Of keys at the places of queries (stage_own_keys): what multiplies keys (Sb, and dS where y is zero) sums to zero along a row,
// so any vector may be taken off the keys. Roundings leave a sum over; so it multiplies only the differences of keys, not what they
// have in common, and nothing where a query attends itself alone. Rows of dS sum to y: of them it is the sum without y that is
// left over.
template <class M, int Dim, int Channels, class Totals, class Own>
NATTEN_EXT_DEVICE void subtract_rows(typename M::Real (&acc)[Channels / 8][4], const Totals& totals, Shared tile, const Own& own,
                                     int first) {
  using Element = typename M::Element;
  struct alignas(2 * sizeof(Element)) Pair {
    Element e[2];
  };
  const int lane = thread_index() % kWarp;
  for (int h = 0; h < 2; ++h) {
    const typename M::Real total = totals[h];
    const Shared row = tile + own.slot_of(lane / 4 + 8 * h) * kPitch<M, Dim> + (first + lane % 4 * 2) * static_cast<uint32_t>(sizeof(Element));
    NATTEN_EXT_UNROLL
    for (int n = 0; n < Channels / 8; ++n) {
      const Pair pair = load_shared<Pair>(row + 8 * n * static_cast<uint32_t>(sizeof(Element)));
      NATTEN_EXT_UNROLL
      for (int e = 0; e < 2; ++e) {
        acc[n][2 * h + e] = fused_multiply_add(-total, as_operand<M>(widen(pair.e[e])), acc[n][2 * h + e]);
      }
    }
  }
}

}  // namespace natten_ext::cuda
