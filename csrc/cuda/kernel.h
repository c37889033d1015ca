// What all kernels share: the loop over a block's tiles, and the scores of a unit.
#pragma once

#include "pairs.h"
#include "staging.h"
#include "tables.h"

namespace natten_ext::cuda {

constexpr int kThreads = 128;  // of a block, at most

template <class Real>
constexpr Real kLog2E = static_cast<Real>(1.4426950408889634074);

// Channels of a result that one block keeps in registers, `Most` in single precision. Further blocks (block_y) do the
// other channels, and compute the scores again.
template <class M, int Dim, int Most>
constexpr int kResultChannels = [] {
  int channels = Dim;
  while (channels > (sizeof(typename M::Real) == 8 ? Most / 2 : Most)) channels /= 2;
  return channels;
}();

// Blocks next to each other have different heads: which one of the launch, and its how-manieth block this is.
NATTEN_EXT_DEVICE int block_of_head(const Params& p) { return p.by_launch_heads(block_x()); }
NATTEN_EXT_DEVICE int launch_head(const Params& p) { return block_x() - block_of_head(p) * p.launch_heads; }

// Runs `body(tile, again)` on the tiles of this block. `again()` is the tile too, but computed when it is called: where
// what it gives is not needed in between, that saves registers. Neighboring blocks have the same tile of their heads, whose
// rows share cache lines.
template <class S, class Body>
NATTEN_EXT_DEVICE void for_each_tile(const ParamsOf<S::kGeneral>& p, Body body) {
  const int head = launch_head(p), count = Tile<S>::count(p, head);
  for (int i = block_of_head(p); i < count; i += p.plan.blocks_per_head) {
    const Tile<S> tile(p, head, i);
    if (tile.empty()) continue;
    body(tile, [&] { return Tile<S>(p, head, forget(i)); });
    if (i + p.plan.blocks_per_head < count) sync_block();  // shared memory is free again
  }
}

// The number that belongs to the staged row of a lane's column c of a block.
template <class Real, class Pairs>
NATTEN_EXT_DEVICE Real staged_scalar(Shared scalars, const Pairs& pairs, int c) {
  return load_shared<Real>(scalars + pairs.slot[c] * static_cast<uint32_t>(sizeof(Real)));
}

// From products to scores: factor * (product - norms) + table, which masks what is no pair; with norms only of l2, per
// own row and per column of the block. S is in base-2 logarithms, and so is the table; its norms are |q|^2 / 2 and |k|^2 / 2,
// so that it becomes -|q - k|^2 / 2 before anything is rounded at the size of the norms. The norms of X are gQ.q and gK.k.
// All kernels get the same bits. What is masked may hold NaN if products do; with `masks` it does not.
template <class Real, class Pairs, class Reader, class OfColumn>
NATTEN_EXT_DEVICE void finish_scores(Real (&s)[4], const Pairs& pairs, Real factor, const Reader& table, bool l2,
                                     const Real (&of_row)[2], OfColumn of_column, bool masks) {
  if (l2) {
    const Real columns[2] = {of_column(0), of_column(1)};
    NATTEN_EXT_UNROLL
    for (int e = 0; e < 4; ++e) s[e] -= of_row[e / 2] + columns[e % 2];
  }
  Real add[4] = {0, 0, 0, 0};
  if (table) table.read(add, pairs);
  NATTEN_EXT_UNROLL
  for (int e = 0; e < 4; ++e) s[e] = fused_multiply_add(s[e], factor, add[e]);
  if (masks) mark_masked(s, pairs, table.masked);
}

// Weights of the softmax from finished scores and the two parts of the row's log-sum-exp. The base comes off first: beside
// a score of 1e5 a float has no room for the rest.
template <class Real>
NATTEN_EXT_DEVICE Real weight_of(Real score, Real base, Real log_sum) {
  return power_of_two(score - base - log_sum);
}

// A weight times a number, as a weight: with +0 for -0, which stands for masked.
template <class Real>
NATTEN_EXT_DEVICE Real product_of(Real weight, Real number) {
  return fused_multiply_add(weight, number, Real(0));
}

// Calls `attempt(careful)`, which sums a tile's results and tells whether they are finite. What is masked has weight zero,
// and zero times NaN is NaN: if any result of the block is not finite, it is all summed once more in `careful` arithmetic
// with masks, so that a NaN or an infinity reaches only what attends it.
template <class M, class Attempt>
NATTEN_EXT_DEVICE void with_care(Attempt attempt) {
  if constexpr (M::kTensor) {
    NATTEN_EXT_NO_UNROLL
    for (int careful = 0; careful < 2; ++careful) {
      if (!any_in_block(!attempt(careful != 0))) break;
    }
  } else {
    attempt(false);
  }
}

template <class Real, int N, int K>
NATTEN_EXT_DEVICE bool all_finite(const Real (&acc)[N][K]) {
  Real sum = 0;
  NATTEN_EXT_UNROLL
  for (int i = 0; i < N * K; ++i) sum = fused_multiply_add(acc[i / K][i % K], Real(0), sum);
  return sum == 0;
}

// Whether masked pairs must be marked: ordinary arithmetic leaves out what is.
template <class M>
NATTEN_EXT_DEVICE bool needs_masks(bool careful) {
  return !M::kTensor || careful;
}

}  // namespace natten_ext::cuda
