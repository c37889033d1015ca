// Which pairs of own and staged rows exist, and the fold that makes one block of two.
#pragma once

#include "products.h"

namespace natten_ext::cuda {

// A lane's pairs of own rows h and columns c of a block.
struct BlockPairs {
  int row[2], column[2];  // places in tables
  int slot[2];            // of the columns' staged rows
  bool valid_y[2], valid_x[2];

  NATTEN_EXT_DEVICE bool valid(int h, int c) const { return valid_y[h] && valid_x[c]; }
  NATTEN_EXT_DEVICE int place(int e) const { return row[e / 2] + column[e % 2]; }
};

template <class Real>
NATTEN_EXT_DEVICE void mark_masked(Real (&weights)[4], const BlockPairs& pairs, Real masked = kMasked<Real>) {
  NATTEN_EXT_UNROLL
  for (int e = 0; e < 4; ++e) weights[e] = pairs.valid(e / 2, e % 2) ? weights[e] : masked;
}

// The columns of a strip. Where windows are at most eight wide, no row has a pair in the same column of two blocks that are
// neighbors on a map row. Then the blocks are folded into one: what is done per pair (exponentials, tables) is done for
// block 0 only, whose column c stands for that of block 1 where `second`.
template <bool ByKey>
struct StripPairs {
  int column[2][2];
  bool folded;  // alike for the whole warp
  bool second[2];

  NATTEN_EXT_DEVICE StripPairs(const TablePlaces& places, const OwnRows<ByKey>& own, const Walk<ByKey>& walk, int x0, int x1) {
    const int first = thread_index() % 4 * 2;
    bool valid_x[2][2];
    NATTEN_EXT_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int b = i / 2, c = i % 2, x = (b ? x1 : x0) + first + c;
      valid_x[b][c] = own.range_x.has(x) && x < walk.x_end;
      column[b][c] = valid_x[b][c] ? (ByKey ? own.x - x : x - own.x) * places.column : places.masked_column;
    }
    folded = walk.across && !any_in_warp((valid_x[0][0] && valid_x[1][0]) || (valid_x[0][1] && valid_x[1][1]));
    NATTEN_EXT_UNROLL
    for (int c = 0; c < 2; ++c) {
      second[c] = folded && valid_x[1][c];
      if (second[c]) column[0][c] = column[1][c];
    }
  }
};

// The pairs of a unit.
template <bool ByKey>
struct UnitPairs {
  const Params& p;
  const OwnRows<ByKey>& own;
  const Walk<ByKey>& walk;
  const StripPairs<ByKey>& strip;
  const Unit& unit;

  NATTEN_EXT_DEVICE BlockPairs block(int b) const {
    const TablePlaces& places = p.table_places;
    BlockPairs pairs;
    const int y = unit.y[b];
    NATTEN_EXT_UNROLL
    for (int h = 0; h < 2; ++h) {
      pairs.valid_y[h] = own.range_y[h].has(y) && (b == 0 || y < walk.y_end);
      pairs.row[h] = pairs.valid_y[h] ? (ByKey ? own.y[0] + h - y : y - own.y[0] - h) * places.row : places.masked_row;
    }
    NATTEN_EXT_UNROLL
    for (int c = 0; c < 2; ++c) {
      const int column = thread_index() % 4 * 2 + c;
      pairs.valid_x[c] = strip.column[b][c] != places.masked_column;  // not kept: registers
      pairs.column[c] = strip.column[b][c];
      pairs.slot[c] = unit.slot_of(b || strip.second[c], column);
      if (y == p.short_row && unit.x[b] + column >= p.short_columns) {
        pairs.valid_x[c] = false;
        pairs.column[c] = places.masked_column;
      }
    }
    return pairs;
  }

  template <class Use>
  NATTEN_EXT_DEVICE void for_each_block(Use use) const {
    use(0, block(0));
    if (!strip.folded) use(1, block(1));
  }

  // Brings numbers of both blocks into block 0, as far as they belong to pairs.
  template <class Real>
  NATTEN_EXT_DEVICE void fold(Scores<Real>& numbers) const {
    NATTEN_EXT_UNROLL
    for (int e = 0; e < 4; ++e) numbers[0][e] = strip.second[e % 2] ? numbers[1][e] : numbers[0][e];
  }
  // And back into their own blocks.
  template <class Real>
  NATTEN_EXT_DEVICE void unfold(Scores<Real>& numbers) const {
    if (!strip.folded) return;
    NATTEN_EXT_UNROLL
    for (int e = 0; e < 4; ++e) {
      numbers[1][e] = strip.second[e % 2] ? numbers[0][e] : kMasked<Real>;
      numbers[0][e] = strip.second[e % 2] ? kMasked<Real> : numbers[0][e];
    }
  }
};

// Calls `use(unit, pairs)` for all units of a piece.
template <bool ByKey, class Use>
NATTEN_EXT_DEVICE void for_each_unit(const Params& p, const OwnRows<ByKey>& own, const Rectangle& piece, Use use) {
  const Walk<ByKey> walk(own, piece);
  walk.run([&](int x0, int x1) { return StripPairs<ByKey>(p.table_places, own, walk, x0, x1); },
           [&](const Unit& unit, const StripPairs<ByKey>& strip) { use(unit, UnitPairs<ByKey>{p, own, walk, strip, unit}); });
}

}  // namespace natten_ext::cuda
