// Which queries and keys a block, a warp and a lane work on.
//
// A tile is a rectangle of one residue class of one (batch, head), eight columns wide: queries in the query-centred
// kernels, keys in the key-centred ones. Each warp has 16 of its rows, two rows of the map. The other side's halo, the
// rectangle of all partners of the tile, is staged in pieces, and a warp walks through the part of a piece that its
// own rows can meet, in blocks of eight adjacent positions of a map row, two blocks at a time (pairs.h).
#pragma once

#include "params.h"

namespace natten_ext::cuda {

NATTEN_EXT_DEVICE int lesser(int a, int b) { return a < b ? a : b; }
NATTEN_EXT_DEVICE int greater(int a, int b) { return a > b ? a : b; }

// A slot of a piece as row and column. Exact while slot * width < 2^20, where the magic number is less than two too large:
// slots are 512 at most.
struct SlotDivisor {
  uint32_t magic;
  NATTEN_EXT_DEVICE explicit SlotDivisor(int width) : magic(static_cast<uint32_t>(0x1p20f * reciprocal(static_cast<float>(width))) + 1) {}
  NATTEN_EXT_DEVICE int operator()(int slot) const { return static_cast<int>(slot * magic >> 20); }
};

// One axis of a residue class. Windows start later for later queries, so partners of a range are a range.
struct Axis {
  Kind kind;
  int queries, keys, kernel;
  Divisor by_kernel;

  // First key of the window of a query.
  NATTEN_EXT_DEVICE int start(int query) const {
    if (kind == Kind::neighborhood) return class_window_start(query, keys, kernel);
    return kind == Kind::grid ? by_kernel(query) * kernel : 0;
  }
  NATTEN_EXT_DEVICE int first_query(int key) const {
    if (kind == Kind::neighborhood) return key < kernel ? 0 : key - kernel + 1 + kernel / 2;
    return kind == Kind::grid ? by_kernel(key) * kernel : 0;
  }
  NATTEN_EXT_DEVICE int end_query(int key) const {
    if (kind == Kind::neighborhood) return key >= keys - kernel ? queries : key + kernel / 2 + 1;
    return kind == Kind::grid ? by_kernel(key) * kernel + kernel : queries;
  }
};

// The partners of an own row on one axis.
struct Range {
  static constexpr int kNowhere = INT32_MIN / 2;  // first of an empty range
  int first, count;
  NATTEN_EXT_DEVICE bool has(int position) const { return static_cast<uint32_t>(position - first) < static_cast<uint32_t>(count); }
};

struct Rectangle {
  int y0, y1, x0, x1;
  NATTEN_EXT_DEVICE int height() const { return y1 - y0; }
  NATTEN_EXT_DEVICE int width() const { return x1 - x0; }
};

// `ByKey`: the tile's own rows are keys, and queries are staged.
template <bool ByKey>
struct Tile {
  int batch, head;  // head of the tensors; `window` has the launch's own
  Window window;
  int residue_y, residue_x;
  Axis y, x;
  int origin_y, origin_x;
  Map own, other;  // the whole maps, undilated

  NATTEN_EXT_DEVICE static int count(const Params& p, int launch_head) {
    const Window& w = p.windows[launch_head];
    const Cut& cut = p.cuts[launch_head];
    return p.batch * w.dilation_y * w.dilation_x * cut.tiles_y * cut.tiles_x;
  }

  NATTEN_EXT_DEVICE Tile(const Params& p, int launch_head, int index)
      : head(p.first_head + launch_head),
        window(p.windows[launch_head]),
        own(ByKey ? p.keys : p.queries),
        other(ByKey ? p.queries : p.keys) {
    const Cut& cut = p.cuts[launch_head];
    // Divides `index`, and returns the remainder.
    const auto split = [&](const Divisor& by, int divisor) {
      const int quotient = by(index), remainder = index - quotient * divisor;
      index = quotient;
      return remainder;
    };
    origin_x = split(cut.by_tiles_x, cut.tiles_x) * kBlock;
    origin_y = split(cut.by_tiles_y, cut.tiles_y) * tile_height(p);
    residue_x = split(cut.by_dilation_x, window.dilation_x);
    residue_y = split(cut.by_dilation_y, window.dilation_y);
    batch = index;
    const auto axis = [&](int queries, int keys, int dilation, int residue, const Divisor& by_dilation, int kernel,
                          const Divisor& by_kernel) {
      const int offset = dilation - 1 - residue;  // positions of the class: (length - residue) / dilation, rounded up
      const int class_keys = by_dilation(keys + offset);
      // A window of `full` is all keys.
      if (p.kind == Kind::full) kernel = class_keys;
      return Axis{p.kind, by_dilation(queries + offset), class_keys, kernel, by_kernel};
    };
    y = axis(p.queries.height, p.keys.height, window.dilation_y, residue_y, cut.by_dilation_y, window.kernel_y, p.by_kernel_y);
    x = axis(p.queries.width, p.keys.width, window.dilation_x, residue_x, cut.by_dilation_x, window.kernel_x, p.by_kernel_x);
  }

  NATTEN_EXT_DEVICE static int tile_height(const Params& p) { return 2 * p.plan.warps; }

  NATTEN_EXT_DEVICE int own_height() const { return ByKey ? y.keys : y.queries; }
  NATTEN_EXT_DEVICE int own_width() const { return ByKey ? x.keys : x.queries; }
  NATTEN_EXT_DEVICE bool empty() const { return origin_y >= own_height() || origin_x >= own_width(); }

  // Whether a position of the class exists. Only undilated maps have a short last row.
  NATTEN_EXT_DEVICE bool owns(int py, int px) const {
    return py < own_height() && px < own_width() && py * own.width + px < own.count;
  }

  // Partners of one own row on an axis.
  NATTEN_EXT_DEVICE Range range(const Axis& axis, int position) const {
    if (!ByKey) return {axis.start(position), axis.kernel};
    const int first = axis.first_query(position);
    return {first, axis.end_query(position) - first};
  }
  // Partners of the own rows [y0, y1] x [x0, x1], all of which exist.
  NATTEN_EXT_DEVICE Rectangle partners(int y0, int y1, int x0, int x1) const {
    if (ByKey) return {y.first_query(y0), y.end_query(y1), x.first_query(x0), x.end_query(x1)};
    return {y.start(y0), y.start(y1) + y.kernel, x.start(x0), x.start(x1) + x.kernel};
  }
  NATTEN_EXT_DEVICE Rectangle halo(const Params& p) const {
    return partners(origin_y, lesser(origin_y + tile_height(p), own_height()) - 1, origin_x,
                    lesser(origin_x + kBlock, own_width()) - 1);
  }

  // Element offset of a position of the class, at channel 0.
  NATTEN_EXT_DEVICE int64_t offset(const Rows& t, int py, int px) const {
    return batch * t.batch + head * t.head + (int64_t{py} * window.dilation_y + residue_y) * t.y +
           (int64_t{px} * window.dilation_x + residue_x) * t.x;
  }
  // The same in bytes where `Params::wide_copies` says that strides are short.
  NATTEN_EXT_DEVICE uint64_t short_offset(const Rows& t, int py, int px, uint32_t size) const {
    const auto low = [](int64_t stride) { return static_cast<uint32_t>(stride); };
    uint64_t elements = multiply_add_wide(batch, low(t.batch), 0);
    elements = multiply_add_wide(head, low(t.head), elements);
    elements = multiply_add_wide(py * window.dilation_y + residue_y, low(t.y), elements);
    return multiply_add_wide(px * window.dilation_x + residue_x, low(t.x), elements) * size;
  }
  // Index into (batch, heads, queries).
  NATTEN_EXT_DEVICE int64_t row_index(const Params& p, int py, int px) const {
    return (int64_t{batch} * p.heads + head) * p.queries.count +
           (int64_t{py} * window.dilation_y + residue_y) * p.queries.width + int64_t{px} * window.dilation_x + residue_x;
  }
};

// A halo cut into pieces of at most `slots` positions: all of it, several whole rows, or parts of one.
struct Pieces {
  Rectangle halo;
  int rows, columns, across, count = 1;

  NATTEN_EXT_DEVICE Pieces(const Rectangle& h, int slots) : halo(h) {
    if (h.height() * h.width() <= slots) return;
    columns = lesser(h.width(), slots);
    rows = slots / columns;
    across = (h.width() + columns - 1) / columns;
    count = (h.height() + rows - 1) / rows * across;
  }
  NATTEN_EXT_DEVICE Rectangle piece(int index) const {
    if (count == 1) return halo;
    const int down = across == 1 ? index : index / across;
    const int y0 = halo.y0 + down * rows, x0 = halo.x0 + (index - down * across) * columns;
    return {y0, lesser(y0 + rows, halo.y1), x0, lesser(x0 + columns, halo.x1)};
  }
};

// A warp's own rows. In fragments a lane has rows g and g + 8: one column of the map, two of its rows.
template <bool ByKey>
struct OwnRows {
  int y[2], x;        // positions of the lane's two rows
  bool exists[2];
  bool any;           // whether the warp has any
  Rectangle partners;  // of all rows of the warp
  Range range_y[2], range_x;  // those of the lane's own; none of rows that don't exist
  bool narrow;  // all windows of the warp are at most eight wide, and at no border: key - query + kernel / 2 is 0 to 7
  int first_slot;  // of the warp in the tile, which is stored row by row

  NATTEN_EXT_DEVICE explicit OwnRows(const Tile<ByKey>& tile) {
    const int warp = thread_index() / kWarp, lane = thread_index() % kWarp;
    first_slot = warp * kWarpRows;
    const int y0 = tile.origin_y + 2 * warp, x0 = tile.origin_x;
    any = tile.owns(y0, x0);
    x = x0 + lane / 4;
    for (int h = 0; h < 2; ++h) {
      y[h] = y0 + h;
      exists[h] = tile.owns(y[h], x);
      range_y[h] = tile.range(tile.y, lesser(y[h], tile.own_height() - 1));
      if (!exists[h]) range_y[h].first = Range::kNowhere;  // and not `count`, which all queries have alike
    }
    range_x = tile.range(tile.x, lesser(x, tile.own_width() - 1));
    if (x >= tile.own_width()) range_x.first = Range::kNowhere;
    narrow = !ByKey && !any_in_warp(tile.x.kernel > kBlock || (exists[0] && range_x.first != x - tile.x.kernel / 2));
    partners = {0, 0, 0, 0};
    if (any) {
      partners = tile.partners(y0, lesser(y0 + 1, tile.own_height() - 1), x0,
                               lesser(x0 + kBlock - 1, tile.own_width() - 1));
    }
  }

  // Slot of row 0 to 15 of the warp in the tile.
  NATTEN_EXT_DEVICE int slot_of(int row) const { return first_slot + row; }
};

}  // namespace natten_ext::cuda
