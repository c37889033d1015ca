// Which queries and keys a block, a warp and a lane work on.
//
// A tile is a rectangle of one residue class of one (batch, head), eight columns wide: queries in the query-centred
// kernels, keys in the key-centred ones. Each warp has 16 of its rows, two rows of the map. The other side's halo, the
// rectangle of all partners of the tile, is staged in pieces, and a warp walks through the part of a piece that its
// own rows can meet, in blocks of eight adjacent positions of a map row, two blocks at a time (pairs.h).
//
// Of general neighborhoods, a tile may also be wide: one row of the map, of which each warp has 16 adjacent positions. With a
// third axis it lies in one plane, whose partners are the same planes for all of it; so pieces are of one plane, and
// only their number and the table's place know of the third axis.
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

// One axis of a residue class. Later queries have windows that start later and end later, so partners of a range are a range.
template <bool General>
struct Axis {
  Kind kind;
  int queries, keys, kernel;
  Divisor by_kernel;

  // Keys of a query: from `start` to before `end`.
  NATTEN_EXT_DEVICE int start(int query) const {
    if (kind == Kind::neighborhood) return class_window_start(query, keys, kernel);
    return kind == Kind::grid ? by_kernel(query) * kernel : 0;
  }
  NATTEN_EXT_DEVICE int end(int query) const { return start(query) + kernel; }
  NATTEN_EXT_DEVICE int first_query(int key) const {
    if (kind == Kind::neighborhood) return key < kernel ? 0 : key - kernel + 1 + kernel / 2;
    return kind == Kind::grid ? by_kernel(key) * kernel : 0;
  }
  NATTEN_EXT_DEVICE int end_query(int key) const {
    if (kind == Kind::neighborhood) return key >= keys - kernel ? queries : key + kernel / 2 + 1;
    return kind == Kind::grid ? by_kernel(key) * kernel + kernel : queries;
  }
};

// Of general neighborhoods: `class_keys` of ../geometry.h. Windows of a grid have a stride as large as they are.
template <>
struct Axis<true> {
  int queries, keys, kernel, stride;
  bool causal;
  int shift;  // from the first query of a stride group to where its window starts, if no border is near
  Divisor by_stride;

  NATTEN_EXT_DEVICE int start(int query) const { return greater(lesser(by_stride(query) * stride + shift, keys - kernel), 0); }
  NATTEN_EXT_DEVICE int end(int query) const { return causal ? query + 1 : start(query) + kernel; }
  NATTEN_EXT_DEVICE int first_query(int key) const {
    if (causal) return key;
    return key < kernel ? 0 : by_stride(key - kernel - shift + stride) * stride;
  }
  NATTEN_EXT_DEVICE int end_query(int key) const {  // not beyond the last query, for a stride is at most the kernel
    return key >= keys - kernel ? queries : by_stride(key - shift) * stride + stride;
  }
};

// The partners of an own row on one axis.
struct Range {
  static constexpr int kNowhere = INT32_MIN / 2;  // first of an empty range
  int first, count;
  NATTEN_EXT_DEVICE bool has(int position) const { return static_cast<uint32_t>(position - first) < static_cast<uint32_t>(count); }
};

// Of the plane `z` of a class.
struct Rectangle {
  int y0, y1, x0, x1, z;
  NATTEN_EXT_DEVICE int height() const { return y1 - y0; }
  NATTEN_EXT_DEVICE int width() const { return x1 - x0; }
};

// `ByKey`: a tile's own rows are keys, and queries are staged. `General`: see ParamsOf.
template <bool ByKey, bool General>
struct Side {
  static constexpr bool kByKey = ByKey, kGeneral = General;
};

// Where a tile lies on the first of three axes: in one plane of its class.
template <bool General>
struct TilePlane {
  static constexpr int z = 0;
};
template <>
struct TilePlane<true> {
  int z, residue_z;
  Range partner_planes;  // none, if the class has no such plane
};

template <class S>
struct Tile : TilePlane<S::kGeneral> {
  static constexpr bool kByKey = S::kByKey, kGeneral = S::kGeneral;
  using TilePlane<kGeneral>::z;
  int batch, head;  // head of the tensors of the own side; `window` has the launch's own
  WindowOf<kGeneral> window;
  int residue_y, residue_x;
  Axis<kGeneral> y, x;
  int origin_y, origin_x;
  Map own, other;  // the whole maps, undilated

  NATTEN_EXT_DEVICE static int count(const ParamsOf<kGeneral>& p, int launch_head) {
    const auto& w = p.windows[launch_head];
    const auto& cut = p.cuts[launch_head];
    const int tiles = p.batch * w.dilation_y * w.dilation_x * cut.tiles_y * cut.tiles_x;
    if constexpr (kGeneral) return tiles * w.dilation_z * cut.tiles_z;
    return tiles;
  }

  NATTEN_EXT_DEVICE Tile(const ParamsOf<kGeneral>& p, int launch_head, int index)
      : head(p.first_head + launch_head),
        window(p.windows[launch_head]),
        own(kByKey ? p.keys : p.queries),
        other(kByKey ? p.queries : p.keys) {
    const auto& cut = p.cuts[launch_head];
    // Divides `index`, and returns the remainder.
    const auto split = [&](const Divisor& by, int divisor) {
      const int quotient = by(index), remainder = index - quotient * divisor;
      index = quotient;
      return remainder;
    };
    origin_x = split(cut.by_tiles_x, cut.tiles_x) * tile_width(p);
    origin_y = split(cut.by_tiles_y, cut.tiles_y) * tile_height(p);
    if constexpr (kGeneral) z = split(cut.by_tiles_z, cut.tiles_z);
    residue_x = split(cut.by_dilation_x, window.dilation_x);
    residue_y = split(cut.by_dilation_y, window.dilation_y);
    // An axis has (length - residue) / dilation positions of a class, rounded up.
    if constexpr (kGeneral) {
      this->residue_z = split(cut.by_dilation_z, window.dilation_z);
      const auto axis = [](int length, int dilation, int residue, const Divisor& by_dilation, int kernel, int stride, bool causal,
                           const Divisor& by_stride) {
        const int positions = by_dilation(length + dilation - 1 - residue);
        const int shift = causal ? stride - kernel : stride / 2 - kernel / 2;
        return Axis<true>{positions, positions, kernel, stride, causal, shift, by_stride};
      };
      const auto& w = window;
      y = axis(own.height, w.dilation_y, residue_y, cut.by_dilation_y, w.kernel_y, w.stride_y, w.causal_y, cut.by_stride_y);
      x = axis(own.width, w.dilation_x, residue_x, cut.by_dilation_x, w.kernel_x, w.stride_x, w.causal_x, cut.by_stride_x);
      const Axis<true> planes =
          axis(own.depth, w.dilation_z, this->residue_z, cut.by_dilation_z, w.kernel_z, w.stride_z, w.causal_z, cut.by_stride_z);
      this->partner_planes = z < planes.queries ? range(planes, z) : Range{0, 0};
    } else {
      const auto axis = [&](int queries, int keys, int dilation, int residue, const Divisor& by_dilation, int kernel,
                            const Divisor& by_kernel) {
        const int offset = dilation - 1 - residue;
        const int class_keys = by_dilation(keys + offset);
        // A window of `full` is all keys.
        if (p.kind == Kind::full) kernel = class_keys;
        return Axis<false>{p.kind, by_dilation(queries + offset), class_keys, kernel, by_kernel};
      };
      y = axis(p.queries.height, p.keys.height, window.dilation_y, residue_y, cut.by_dilation_y, window.kernel_y, p.by_kernel_y);
      x = axis(p.queries.width, p.keys.width, window.dilation_x, residue_x, cut.by_dilation_x, window.kernel_x, p.by_kernel_x);
    }
    batch = index;
  }

  NATTEN_EXT_DEVICE static int tile_height(const Params& p) { return kGeneral ? p.plan.tile_height() : 2 * p.plan.warps; }
  NATTEN_EXT_DEVICE static int tile_width(const Params& p) { return kGeneral ? p.plan.tile_width() : kBlock; }

  NATTEN_EXT_DEVICE int own_height() const { return kByKey ? y.keys : y.queries; }
  NATTEN_EXT_DEVICE int own_width() const { return kByKey ? x.keys : x.queries; }
  NATTEN_EXT_DEVICE bool empty() const {
    if constexpr (kGeneral) {
      if (this->partner_planes.count == 0) return true;
    }
    return origin_y >= own_height() || origin_x >= own_width();
  }

  // Whether a position of the tile's plane exists. Only undilated maps have a short last row.
  NATTEN_EXT_DEVICE bool owns(int py, int px) const {
    return py < own_height() && px < own_width() && (kGeneral || py * own.width + px < own.count);
  }

  // Partners of one own row on an axis.
  NATTEN_EXT_DEVICE static Range range(const Axis<kGeneral>& axis, int position) {
    const int first = kByKey ? axis.first_query(position) : axis.start(position);
    if (!kByKey && !kGeneral) return {first, axis.kernel};
    return {first, (kByKey ? axis.end_query(position) : axis.end(position)) - first};
  }
  // Partners of the own rows [y0, y1] x [x0, x1], all of which exist, in their first plane.
  NATTEN_EXT_DEVICE Rectangle partners(int y0, int y1, int x0, int x1) const {
    int plane = 0;
    if constexpr (kGeneral) plane = this->partner_planes.first;
    if (kByKey) return {y.first_query(y0), y.end_query(y1), x.first_query(x0), x.end_query(x1), plane};
    return {y.start(y0), y.end(y1), x.start(x0), x.end(x1), plane};
  }
  NATTEN_EXT_DEVICE Rectangle halo(const Params& p) const {
    return partners(origin_y, lesser(origin_y + tile_height(p), own_height()) - 1, origin_x,
                    lesser(origin_x + tile_width(p), own_width()) - 1);
  }

  // The tile for tensors of the staged side: where heads share a key head, with that, or with the `member`-th of the heads.
  NATTEN_EXT_DEVICE Tile staged_side(const ParamsOf<kGeneral>& p, int member = 0) const {
    Tile tile = *this;
    if constexpr (kGeneral) tile.head = kByKey ? head * p.sharing + member : p.by_sharing(head);
    return tile;
  }

  // Element offset of a position of the class, at channel 0.
  NATTEN_EXT_DEVICE int64_t offset(const Rows& t, int pz, int py, int px) const {
    int64_t elements = batch * t.batch + head * t.head + (int64_t{py} * window.dilation_y + residue_y) * t.y +
                       (int64_t{px} * window.dilation_x + residue_x) * t.x;
    if constexpr (kGeneral) elements += (int64_t{pz} * window.dilation_z + this->residue_z) * t.z;
    return elements;
  }
  // The same in bytes where `Params::wide_copies` says that strides are short.
  NATTEN_EXT_DEVICE uint64_t short_offset(const Rows& t, int pz, int py, int px, uint32_t size) const {
    const auto low = [](int64_t stride) { return static_cast<uint32_t>(stride); };
    uint64_t elements = multiply_add_wide(batch, low(t.batch), 0);
    elements = multiply_add_wide(head, low(t.head), elements);
    if constexpr (kGeneral) elements = multiply_add_wide(pz * window.dilation_z + this->residue_z, low(t.z), elements);
    elements = multiply_add_wide(py * window.dilation_y + residue_y, low(t.y), elements);
    return multiply_add_wide(px * window.dilation_x + residue_x, low(t.x), elements) * size;
  }
  // Index into (batch, heads, queries).
  NATTEN_EXT_DEVICE int64_t row_index(const Params& p, int pz, int py, int px) const {
    const int64_t row = int64_t{py} * window.dilation_y + residue_y;
    int64_t index = (int64_t{batch} * p.heads + head) * p.queries.count + row * p.queries.width +
                    int64_t{px} * window.dilation_x + residue_x;
    if constexpr (kGeneral) {
      index += (int64_t{pz} * window.dilation_z + this->residue_z) * p.queries.height * p.queries.width;
    }
    return index;
  }
};

// A halo cut into pieces of at most `slots` positions: planes of it, several whole rows of a plane, or parts of one row.
template <bool General>
struct Pieces {
  Rectangle halo;
  int rows, columns, across, count = 1;
  int in_plane = 1;  // `count` of them in each plane, if there are several

  template <class Tile>
  NATTEN_EXT_DEVICE Pieces(const Params& p, const Tile& tile) : halo(tile.halo(p)) {
    const int slots = p.plan.slots;
    if (halo.height() * halo.width() > slots) {
      columns = lesser(halo.width(), slots);
      rows = slots / columns;
      across = (halo.width() + columns - 1) / columns;
      count = (halo.height() + rows - 1) / rows * across;
    }
    if constexpr (General) {
      in_plane = count;
      count *= tile.partner_planes.count;
    }
  }
  NATTEN_EXT_DEVICE Rectangle piece(int index) const {
    int z = halo.z;
    if constexpr (General) {
      const int plane = index / in_plane;
      z += plane;
      index -= plane * in_plane;
    }
    if ((General ? in_plane : count) == 1) return {halo.y0, halo.y1, halo.x0, halo.x1, z};
    const int down = across == 1 ? index : index / across;
    const int y0 = halo.y0 + down * rows, x0 = halo.x0 + (index - down * across) * columns;
    return {y0, lesser(y0 + rows, halo.y1), x0, lesser(x0 + columns, halo.x1), z};
  }
};

// A piece of a walk, and of which of the heads that share a key head it is: they take turns, each with all pieces.
struct Turn {
  int member = 0, piece;
};
template <bool General>
NATTEN_EXT_DEVICE Turn turn_of(int index, const Pieces<General>& pieces) {
  if constexpr (!General) return {0, index};
  const int member = index / pieces.count;
  return {member, index - member * pieces.count};
}
// How many pieces a walk over the queries of all these heads has.
template <bool General>
NATTEN_EXT_DEVICE int pieces_in_turns(const Params& p, const Pieces<General>& pieces) {
  return General ? pieces.count * p.sharing : pieces.count;
}

// From one of a lane's two rows to the other.
template <bool General>
struct RowStep {
  static constexpr int step_y = 1, step_x = 0;
  NATTEN_EXT_DEVICE explicit RowStep(const Plan&) {}
};
template <>
struct RowStep<true> {
  int step_y, step_x;
  NATTEN_EXT_DEVICE explicit RowStep(const Plan& plan) : step_y(plan.wide ? 0 : 1), step_x(plan.wide ? kBlock : 0) {}
};

// A warp's own rows. In fragments a lane has rows g and g + 8: those of two eights, one below the other or, in a wide tile,
// side by side.
template <class S>
struct OwnRows : RowStep<S::kGeneral> {
  using RowStep<S::kGeneral>::step_y, RowStep<S::kGeneral>::step_x;
  static constexpr int kRanges = S::kGeneral ? 2 : 1;
  int y[2], x, z;     // positions of the lane's two rows; x: of the first
  bool exists[2];
  bool any;           // whether the warp has any
  Rectangle partners;  // of all rows of the warp
  Range range_y[2], range_x[kRanges];  // those of the lane's own; none of rows that don't exist
  bool narrow;  // all windows of the warp are at most eight wide, and at no border: key - query + kernel / 2 is 0 to 7
  int first_slot;  // of the warp in the tile, which is stored row by row

  NATTEN_EXT_DEVICE OwnRows(const Params& p, const Tile<S>& tile) : RowStep<S::kGeneral>(p.plan), z(tile.z) {
    const int warp = thread_index() / kWarp, lane = thread_index() % kWarp;
    first_slot = warp * kWarpRows;
    const int y0 = tile.origin_y + 2 * step_y * warp, x0 = tile.origin_x + 2 * step_x * warp;
    any = tile.owns(y0, x0);
    x = x0 + lane / 4;
    for (int h = 0; h < 2; ++h) {
      y[h] = y0 + h * step_y;
      exists[h] = tile.owns(y[h], x_of(h));
      range_y[h] = tile.range(tile.y, lesser(y[h], tile.own_height() - 1));
      if (!exists[h]) range_y[h].first = Range::kNowhere;  // and not `count`, which all queries of a sliding window have alike
    }
    bool regular = tile.x.kernel <= kBlock;
    for (int h = 0; h < kRanges; ++h) {
      range_x[h] = tile.range(tile.x, lesser(x_of(h), tile.own_width() - 1));
      if (x_of(h) >= tile.own_width()) range_x[h].first = Range::kNowhere;
      regular = regular && !(exists[h] && range_x[h].first != x_of(h) - tile.x.kernel / 2);
    }
    narrow = !S::kByKey && !any_in_warp(!regular);
    partners = {0, 0, 0, 0, 0};
    if (any) {
      partners = tile.partners(y0, lesser(y0 + step_y, tile.own_height() - 1), x0,
                               lesser(x0 + step_x + kBlock - 1, tile.own_width() - 1));
    }
  }

  // Columns of the lane's two rows.
  NATTEN_EXT_DEVICE int x_of(int h) const { return x + h * step_x; }
  // Index of the lane's row h into (batch, heads, queries).
  NATTEN_EXT_DEVICE int64_t index(const Params& p, const Tile<S>& tile, int h) const { return tile.row_index(p, tile.z, y[h], x_of(h)); }
  // Position of row 0 to 15 of the warp.
  NATTEN_EXT_DEVICE int row_y(int row) const { return y[0] + row / kBlock * step_y; }
  NATTEN_EXT_DEVICE int row_x(int row) const { return x - thread_index() % kWarp / 4 + row % kBlock + row / kBlock * step_x; }
  // Its slot in the tile.
  NATTEN_EXT_DEVICE int slot_of(int row) const { return first_slot + row; }
};

}  // namespace natten_ext::cuda
