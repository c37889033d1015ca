// Which pairs of own and staged rows exist, and the fold that makes one block of two.
#pragma once

#include "products.h"

namespace natten_ext::cuda {

// A lane's pairs of own rows h and columns c of a block.
template <bool General>
struct BlockPairs {
  static constexpr int kRows = General ? 2 : 1;  // the columns of the second own row may be others: in wide tiles
  int row[2], column[kRows][2];  // places in tables
  int slot[2];                   // of the columns' staged rows
  bool valid_y[2], valid_x[kRows][2];

  NATTEN_EXT_DEVICE bool valid(int h, int c) const { return valid_y[h] && valid_x[h % kRows][c]; }
  NATTEN_EXT_DEVICE int column_of(int h, int c) const { return column[h % kRows][c]; }
  NATTEN_EXT_DEVICE int place(int e) const { return row[e / 2] + column_of(e / 2, e % 2); }
};

template <class Real, bool General>
NATTEN_EXT_DEVICE void mark_masked(Real (&weights)[4], const BlockPairs<General>& pairs, Real masked = kMasked<Real>) {
  NATTEN_EXT_UNROLL
  for (int e = 0; e < 4; ++e) weights[e] = pairs.valid(e / 2, e % 2) ? weights[e] : masked;
}

// The columns of a strip. Where windows are at most eight wide, no row has a pair in the same column of two blocks that are
// neighbors on a map row. Then the blocks are folded into one: what is done per pair (exponentials, tables) is done for
// block 0 only, whose column c stands for that of block 1 where `second`. In wide tiles that is not so for both own rows.
template <class S>
struct StripPairs {
  static constexpr int kRows = BlockPairs<S::kGeneral>::kRows;
  int column[2][kRows][2];
  bool folded;  // alike for the whole warp
  bool second[2];

  NATTEN_EXT_DEVICE StripPairs(const TablePlaces& places, const OwnRows<S>& own, const Walk<S>& walk, int x0, int x1) {
    const int first = thread_index() % 4 * 2;
    bool valid_x[2][kRows][2];
    NATTEN_EXT_UNROLL
    for (int i = 0; i < 4 * kRows; ++i) {
      const int b = i / 2 % 2, c = i % 2, h = i / 4, x = (b ? x1 : x0) + first + c;
      valid_x[b][h][c] = own.range_x[h].has(x) && x < walk.x_end;
      column[b][h][c] = valid_x[b][h][c] ? (S::kByKey ? own.x_of(h) - x : x - own.x_of(h)) * places.column : places.masked_column;
    }
    folded = walk.across && own.step_x == 0 &&
             !any_in_warp((valid_x[0][0][0] && valid_x[1][0][0]) || (valid_x[0][0][1] && valid_x[1][0][1]));
    NATTEN_EXT_UNROLL
    for (int c = 0; c < 2; ++c) {
      second[c] = folded && valid_x[1][0][c];
      NATTEN_EXT_UNROLL
      for (int h = 0; h < kRows; ++h) {
        if (second[c]) column[0][h][c] = column[1][h][c];
      }
    }
  }
};

// The pairs of a unit.
template <class S>
struct UnitPairs {
  const Params& p;
  const OwnRows<S>& own;
  const Walk<S>& walk;
  const StripPairs<S>& strip;
  const Unit& unit;

  NATTEN_EXT_DEVICE BlockPairs<S::kGeneral> block(int b) const {
    constexpr int kRows = BlockPairs<S::kGeneral>::kRows;
    const TablePlaces& places = p.table_places;
    BlockPairs<S::kGeneral> pairs;
    const int y = unit.y[b];
    NATTEN_EXT_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int own_y = own.y[0] + h * own.step_y;
      pairs.valid_y[h] = own.range_y[h].has(y) && (b == 0 || y < walk.y_end);
      pairs.row[h] = pairs.valid_y[h] ? (S::kByKey ? own_y - y : y - own_y) * places.row : places.masked_row;
      if constexpr (S::kGeneral) pairs.row[h] += unit.plane * places.plane;
    }
    NATTEN_EXT_UNROLL
    for (int c = 0; c < 2; ++c) {
      const int column = thread_index() % 4 * 2 + c;
      pairs.slot[c] = unit.slot_of(b || strip.second[c], column);
      NATTEN_EXT_UNROLL
      for (int h = 0; h < kRows; ++h) {
        pairs.valid_x[h][c] = strip.column[b][h][c] != places.masked_column;  // not kept: registers
        pairs.column[h][c] = strip.column[b][h][c];
        if (!S::kGeneral && y == p.short_row && unit.x[b] + column >= p.short_columns) {
          pairs.valid_x[h][c] = false;
          pairs.column[h][c] = places.masked_column;
        }
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
template <class S, class Use>
NATTEN_EXT_DEVICE void for_each_unit(const Params& p, const OwnRows<S>& own, const Rectangle& piece, Use use) {
  const Walk<S> walk(own, piece);
  walk.run([&](int x0, int x1) { return StripPairs<S>(p.table_places, own, walk, x0, x1); },
           [&](const Unit& unit, const StripPairs<S>& strip) { use(unit, UnitPairs<S>{p, own, walk, strip, unit}); });
}

}  // namespace natten_ext::cuda
