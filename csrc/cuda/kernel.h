// What all kernels share: the loop over a block's tiles, and the scores of a unit.
#pragma once

#include "pairs.h"
#include "staging.h"
#include "tables.h"

namespace natten_ext::cuda {

constexpr int kThreads = 128;  // of a block, at most

template <class Real>
constexpr Real kLog2E = static_cast<Real>(1.4426950408889634074);
template <class Real>
constexpr Real kInfinity = static_cast<Real>(__builtin_huge_val());

// Channels of a result that one block keeps in registers, `Most` in single precision. Further blocks (block_y) do the
// other channels, and compute the scores again.
template <class M, int D, int Most>
constexpr int kResultChannels = [] {
  int channels = D;
  while (channels > (sizeof(typename M::Real) == 8 ? Most / 2 : Most)) channels /= 2;
  return channels;
}();

// Runs `body(tile, again)` on the tiles of this block. `again()` is the tile too, but computed when it is called: where
// what it gives is not needed in between, that saves registers. Blocks next to each other have different heads of the
// same tile, whose rows share cache lines.
template <bool ByKey, class Body>
NATTEN_EXT_DEVICE void for_each_tile(const Params& p, Body body) {
  const int head = block_x() % p.launch_heads, count = Tile<ByKey>::count(p, head);
  for (int i = block_x() / p.launch_heads; i < count; i += p.plan.blocks_per_head) {
    const Tile<ByKey> tile(p, head, i);
    if (tile.empty()) continue;
    body(tile, [&] { return Tile<ByKey>(p, head, forget(i)); });
    if (i + p.plan.blocks_per_head < count) sync_block();  // shared memory is free again
  }
}

// The number that belongs to the staged row of a lane's column c of a block.
template <class Real>
NATTEN_EXT_DEVICE Real staged_scalar(Shared scalars, const BlockPairs& pairs, int c) {
  return load_shared<Real>(scalars + pairs.slot[c] * static_cast<uint32_t>(sizeof(Real)));
}

// From products to scores in base-2 logarithms, -infinity where there is no pair: a times log2(e) is `factor`,
// `key_bias(c, h)` the key's share, and the table holds base-2 logarithms.
template <class Real, class Reader, class KeyBias>
NATTEN_EXT_DEVICE void finish_scores(Real (&s)[4], const BlockPairs& pairs, Real factor, const Reader& table,
                                     KeyBias key_bias) {
  NATTEN_EXT_UNROLL
  for (int e = 0; e < 4; ++e) {
    const int h = e / 2, c = e % 2;
    const bool valid = pairs.valid(h, c);
    Real add = key_bias(h, c);
    if (table && valid) add += table.at(pairs.table_y[h], pairs.table_x[c]);
    s[e] = valid ? fused_multiply_add(s[e], factor, add) : -kInfinity<Real>;
  }
}

}  // namespace natten_ext::cuda
