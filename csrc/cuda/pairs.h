// Which pairs of own and staged rows exist, and the fold that makes one block of two.
#pragma once

#include "products.h"

namespace natten_ext::cuda {

// Which of a lane's pairs of own row h and column c of a block exist, and their place in the table.
struct BlockPairs {
  bool valid_y[2], valid_x[2];
  int table_y[2], table_x[2];
  int slot[2];  // of the columns' staged rows

  NATTEN_EXT_DEVICE bool valid(int h, int c) const { return valid_y[h] && valid_x[c]; }
};

template <class Real>
NATTEN_EXT_DEVICE void mark_masked(Real (&weights)[4], const BlockPairs& pairs) {
  NATTEN_EXT_UNROLL
  for (int e = 0; e < 4; ++e) weights[e] = pairs.valid(e / 2, e % 2) ? weights[e] : kMasked<Real>;
}

template <bool ByKey>
NATTEN_EXT_DEVICE BlockPairs pairs_of(const Params& p, const Tile<ByKey>& tile, const OwnRows<ByKey>& own, const Unit& unit,
                                      int block) {
  BlockPairs pairs;
  const int zero_y = p.table_rows / 2, zero_x = p.table_columns / 2;
  const int y = unit.y[block], first = thread_index() % 4 * 2;
  const int start_y = ByKey ? tile.y.start(y) : 0;
  for (int h = 0; h < 2; ++h) {
    const int key = ByKey ? own.y[h] : y, start = ByKey ? start_y : own.start_y[h];
    pairs.valid_y[h] = own.exists[h] && static_cast<uint32_t>(key - start) < static_cast<uint32_t>(tile.y.kernel);
    pairs.table_y[h] = zero_y + (ByKey ? own.y[h] - y : y - own.y[h]);
  }
  for (int c = 0; c < 2; ++c) {
    const int x = unit.x[block] + first + c;
    const int key = ByKey ? own.x : x, start = ByKey ? tile.x.start(x) : own.start_x;
    pairs.valid_x[c] = first + c < unit.columns[block] && static_cast<uint32_t>(key - start) < static_cast<uint32_t>(tile.x.kernel);
    pairs.table_x[c] = zero_x + (ByKey ? own.x - x : x - own.x);
    pairs.slot[c] = unit.slot_of(block, first + c);
  }
  return pairs;
}

// The pairs of a unit. Where windows are at most eight wide, no row has a pair in the same column of two blocks that are
// neighbors on a map row. Then the blocks are folded into one: what is done per pair (exponentials, tables) is done for
// block 0 only, whose column c stands for that of block 1 where `second`.
template <bool ByKey>
struct UnitPairs {
  BlockPairs blocks[2];
  bool folded;  // alike for the whole warp
  bool second[2];

  NATTEN_EXT_DEVICE UnitPairs(const Params& p, const Tile<ByKey>& tile, const OwnRows<ByKey>& own, const Unit& unit)
      : blocks{pairs_of(p, tile, own, unit, 0), pairs_of(p, tile, own, unit, 1)} {
    const bool twice = (blocks[0].valid_x[0] && blocks[1].valid_x[0]) || (blocks[0].valid_x[1] && blocks[1].valid_x[1]);
    folded = !any_in_warp(twice || (unit.y[0] != unit.y[1] && unit.columns[1] > 0));
    NATTEN_EXT_UNROLL
    for (int c = 0; c < 2; ++c) {
      second[c] = folded && blocks[1].valid_x[c];
      if (!second[c]) continue;
      blocks[0].valid_x[c] = true;
      blocks[0].table_x[c] = blocks[1].table_x[c];
      blocks[0].slot[c] = blocks[1].slot[c];
    }
  }

  template <class Use>
  NATTEN_EXT_DEVICE void for_each_block(Use use) const {
    use(0, blocks[0]);
    if (!folded) use(1, blocks[1]);
  }

  // Brings numbers of both blocks into block 0, as far as they belong to pairs.
  template <class Real>
  NATTEN_EXT_DEVICE void fold(Scores<Real>& numbers) const {
    NATTEN_EXT_UNROLL
    for (int e = 0; e < 4; ++e) numbers[0][e] = second[e % 2] ? numbers[1][e] : numbers[0][e];
  }
  // And back into their own blocks.
  template <class Real>
  NATTEN_EXT_DEVICE void unfold(Scores<Real>& numbers) const {
    if (!folded) return;
    NATTEN_EXT_UNROLL
    for (int e = 0; e < 4; ++e) {
      numbers[1][e] = second[e % 2] ? numbers[0][e] : kMasked<Real>;
      numbers[0][e] = second[e % 2] ? kMasked<Real> : numbers[0][e];
    }
  }
};

}  // namespace natten_ext::cuda
