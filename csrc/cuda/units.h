// The walk of a warp through a staged piece.
#pragma once

#include "tiles.h"

namespace natten_ext::cuda {

// Two blocks of the staged side: neighbors on a map row, or one below the other.
struct Unit {
  int y[2], x[2], slot[2];
  int last_slot;  // rows past it were not staged
  int plane = 0;  // key minus query on the third axis

  NATTEN_EXT_DEVICE int slot_of(int block, int position) const {
    return lesser((block ? slot[1] : slot[0]) + position, last_slot);
  }
};

// Goes through the part of a piece that the warp's own rows can meet: strips one or two blocks wide, and down each of them.
// What does not change on the way down, `enter(x)` makes once per strip; `use(unit, strip)` gets it. `x`: of both blocks.
template <class S>
struct Walk {
  int y_begin, y_end, x_begin, x_end, width;  // width: of the piece
  int first_slot, last_slot, plane;
  bool across;  // both blocks of a unit are on one row: where rows have an even number of blocks, none is left over

  NATTEN_EXT_DEVICE Walk(const OwnRows<S>& own, const Rectangle& piece) {
    const Rectangle& wanted = own.partners;
    y_begin = greater(wanted.y0, piece.y0);
    y_end = lesser(wanted.y1, piece.y1);
    x_begin = greater(wanted.x0, piece.x0);
    x_end = lesser(wanted.x1, piece.x1);
    width = piece.width();
    first_slot = (y_begin - piece.y0) * width - piece.x0;
    last_slot = piece.height() * width - 1;
    plane = S::kByKey ? own.z - piece.z : piece.z - own.z;
    const int blocks = (x_end - x_begin + kBlock - 1) / kBlock, height = y_end - y_begin;
    if constexpr (S::kGeneral) across = (blocks + 1) / 2 * height <= blocks * ((height + 1) / 2);  // what makes fewer units
    else across = blocks % 2 == 0;
  }

  template <class Enter, class Use>
  NATTEN_EXT_DEVICE void run(Enter enter, Use use) const {
    NATTEN_EXT_NO_UNROLL
    for (int x = x_begin; x < x_end; x += across ? 2 * kBlock : kBlock) {
      const int x1 = across ? x + kBlock : x, down = across ? 1 : 2;
      const auto strip = enter(x, x1);
      int slot = first_slot + x;
      NATTEN_EXT_NO_UNROLL
      for (int y = y_begin; y < y_end; y += down, slot += down * width) {
        use(Unit{{y, across ? y : y + 1}, {x, x1}, {slot, slot + (across ? kBlock : width)}, last_slot, plane}, strip);
      }
    }
  }
};

}  // namespace natten_ext::cuda
