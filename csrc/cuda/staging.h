// Between global and shared memory: tiles and pieces come in by asynchronous copies, results leave through a warp's
// own part of shared memory in wide stores.
#pragma once

#include "tiles.h"

namespace natten_ext::cuda {

// Copies up to 16 bytes of a row, of which `bytes` exist; zeros after them. `width`: what the row's alignment allows.
template <class Element>
NATTEN_EXT_DEVICE void copy_chunk(Shared destination, const Element* source, int bytes, int width) {
  const auto* from = reinterpret_cast<const unsigned char*>(source);
  if (width == 16) {
    copy_async<16>(destination, from, bytes > 0);
  } else if (width == 8) {
    NATTEN_EXT_UNROLL
    for (int i = 0; i < 16; i += 8) copy_async<8>(destination + i, from + i, i < bytes);
  } else if (sizeof(Element) == 4 || width == 4) {
    NATTEN_EXT_UNROLL
    for (int i = 0; i < 16; i += 4) copy_async<4>(destination + i, from + i, i < bytes);
  } else {
    NATTEN_EXT_UNROLL
    for (int i = 0; i < 16; i += sizeof(Element)) {
      Element value{};
      if (i < bytes) value = load_global(reinterpret_cast<const Element*>(from + i));
      store_shared(destination + i, value);
    }
  }
}

// Starts copying the rows of a rectangle of a tensor, one slot after the other; zeros where the map has no row.
template <class M, int D, class AnyTile>
NATTEN_EXT_DEVICE void stage_rows(Shared destination, const Rows& t, const Params& p, const AnyTile& tile,
                                  const Rectangle& r, const Map& map) {
  using Element = typename M::Element;
  constexpr int kChunk = 16 / sizeof(Element), kChunks = D / kChunk;
  const Divisor by_width(r.width());
  const int64_t step_y = t.y * tile.window.dilation_y, step_x = t.x * tile.window.dilation_x;
  const int limit_y = (map.height - tile.residue_y + tile.window.dilation_y - 1) / tile.window.dilation_y;
  const int limit_x = (map.width - tile.residue_x + tile.window.dilation_x - 1) / tile.window.dilation_x;
  const auto* origin = static_cast<const Element*>(t.data) + tile.offset(t, r.y0, r.x0);
  const int total = r.height() * r.width() * kChunks;
  for (int i = thread_index(); i < total; i += block_threads()) {
    const int slot = i / kChunks, channel = i % kChunks * kChunk;
    const int row = by_width(slot), column = slot - row * r.width();
    const int y = r.y0 + row, x = r.x0 + column;
    const bool exists = y < limit_y && x < limit_x && int64_t{y} * map.width + x < map.count;
    const int bytes = exists ? (p.head_dim - channel) * static_cast<int>(sizeof(Element)) : 0;
    copy_chunk(destination + slot * kPitch<M, D> + channel * static_cast<uint32_t>(sizeof(Element)),
               origin + row * step_y + column * step_x + channel, bytes, p.vector_bytes);
  }
}

// The same for one number per row of a (batch, heads, queries) array.
template <class Real, class AnyTile>
NATTEN_EXT_DEVICE void stage_scalars(Shared destination, const void* source, const Params& p, const AnyTile& tile,
                                     const Rectangle& r) {
  const Divisor by_width(r.width());
  const int total = r.height() * r.width();
  for (int slot = thread_index(); slot < total; slot += block_threads()) {
    const int row = by_width(slot), y = r.y0 + row, x = r.x0 + slot - row * r.width();
    const bool exists = int64_t{y} * p.queries.width + x < p.queries.count;
    const int64_t index = exists ? tile.row_index(p, y, x) : 0;
    copy_async<sizeof(Real)>(destination + slot * static_cast<uint32_t>(sizeof(Real)),
                             static_cast<const Real*>(source) + index, exists);
  }
}

// Starts copying a tile's own rows of p.own[0] to p.own[Count - 1], as far as they are given.
template <class M, int D, int Count, bool ByKey>
NATTEN_EXT_DEVICE void stage_own(const SharedLayout<M, D>& shared, const Params& p, const Tile<ByKey>& tile) {
  const Rectangle rectangle{tile.origin_y, tile.origin_y + Tile<ByKey>::tile_height(p), tile.origin_x,
                            tile.origin_x + Tile<ByKey>::tile_width(p)};
  NATTEN_EXT_NO_UNROLL
  for (int i = 0; i < Count; ++i) {
    if (p.own[i].data != nullptr) stage_rows<M, D>(shared.own(i), p.own[i], p, tile, rectangle, tile.own);
  }
}

// The same for a piece: p.staged[0] and on, and the numbers of its rows in p.scalars[0] and on.
template <class M, int D, int Tensors, int Scalars, bool ByKey>
NATTEN_EXT_DEVICE void stage_piece(const SharedLayout<M, D>& shared, int stage, const Params& p, const Tile<ByKey>& tile,
                                   const Rectangle& piece) {
  NATTEN_EXT_NO_UNROLL
  for (int i = 0; i < Tensors; ++i) {
    if (p.staged[i].data != nullptr) stage_rows<M, D>(shared.rows(stage, i), p.staged[i], p, tile, piece, tile.other);
  }
  NATTEN_EXT_NO_UNROLL
  for (int i = 0; i < Scalars; ++i) {
    stage_scalars<typename M::Real>(shared.scalars(stage, i), p.scalars[i], p, tile, piece);
  }
}

NATTEN_EXT_DEVICE void copy_async_wait_for(int pending) {
  if (pending == 0) copy_async_wait<0>();
  else if (pending == 1) copy_async_wait<1>();
  else copy_async_wait<2>();
}

// Runs `consume(piece, stage)` on every piece while `issue(piece, stage)` starts the copies of later ones. Copies that
// the caller has started before arrive with the first piece.
template <class Issue, class Consume>
NATTEN_EXT_DEVICE void for_each_piece(int count, int stages, Issue issue, Consume consume) {
  const int ahead = stages - 1;
  NATTEN_EXT_NO_UNROLL
  for (int i = -ahead; i < count; ++i) {
    if (i + ahead < count) issue(i + ahead, (i + ahead) % stages);
    copy_async_commit();
    if (i < 0) continue;
    copy_async_wait_for(ahead);
    sync_block();
    consume(i, i % stages);
    sync_block();  // the stage is free again
  }
}

// Dot product of the rows at `a` and `b`.
template <class M, int D>
NATTEN_EXT_DEVICE typename M::Real row_product(Shared a, Shared b) {
  using Element = typename M::Element;
  constexpr int kChunk = 16 / sizeof(Element);
  struct alignas(16) Chunk {
    Element e[kChunk];
  };
  typename M::Real sum = 0;
  NATTEN_EXT_NO_UNROLL
  for (int channel = 0; channel < D; channel += kChunk) {
    const uint32_t at = channel * static_cast<uint32_t>(sizeof(Element));
    const Chunk left = load_shared<Chunk>(a + at), right = load_shared<Chunk>(b + at);
    NATTEN_EXT_UNROLL
    for (int i = 0; i < kChunk; ++i) sum = fused_multiply_add(widen(left.e[i]), widen(right.e[i]), sum);
  }
  return sum;
}

// Writes factor * (a row . b row) for every row of a staged piece.
template <class M, int D>
NATTEN_EXT_DEVICE void write_key_products(Shared destination, Shared a, Shared b, const Rectangle& piece,
                                          typename M::Real factor) {
  using Real = typename M::Real;
  for (int slot = thread_index(); slot < piece.height() * piece.width(); slot += block_threads()) {
    const uint32_t at = slot * kPitch<M, D>;
    store_shared(destination + slot * static_cast<uint32_t>(sizeof(Real)), factor * row_product<M, D>(a + at, b + at));
  }
}

// The same for factor * |row|^2.
template <class M, int D>
NATTEN_EXT_DEVICE void write_key_norms(Shared destination, Shared rows, const Rectangle& piece, typename M::Real factor) {
  write_key_products<M, D>(destination, rows, rows, piece, factor);
}

// The dot product of two tensors for the lane's two own rows, by the four lanes that share them.
template <class M, int D, class Own>
NATTEN_EXT_DEVICE void own_row_products(typename M::Real (&sums)[2], Shared a, Shared b, const Own& own) {
  using Element = typename M::Element;
  const int lane = thread_index() % kWarp;
  for (int h = 0; h < 2; ++h) {
    const uint32_t row = own.slot_of(lane / 4 + 8 * h) * kPitch<M, D>;
    sums[h] = 0;
    NATTEN_EXT_NO_UNROLL
    for (int channel = lane % 4; channel < D; channel += 4) {
      const uint32_t at = row + channel * static_cast<uint32_t>(sizeof(Element));
      sums[h] = fused_multiply_add(widen(load_shared<Element>(a + at)), widen(load_shared<Element>(b + at)), sums[h]);
    }
    sums[h] += shuffle_xor(sums[h], 1);
    sums[h] += shuffle_xor(sums[h], 2);
  }
}

template <class Element, class Real>
NATTEN_EXT_DEVICE void store_pair(Shared address, Real first, Real second) {
  if constexpr (sizeof(Element) == 2) {
    store_shared(address, pack<Element>(first, second));
  } else {
    struct alignas(2 * sizeof(Element)) Pair {
      Element e[2];
    };
    store_shared(address, Pair{{first, second}});
  }
}

// Writes a warp's 16 x DC results, times `factor`, to channels `first` and on of its own rows. `scratch` is a tile in
// shared memory whose rows of this warp nobody needs any more.
template <class M, int D, int DC, bool ByKey>
NATTEN_EXT_DEVICE void write_rows(const typename M::Real (&acc)[DC / 8][4], const typename M::Real (&factor)[2],
                                  const Rows& t, Shared scratch, const Params& p, const Tile<ByKey>& tile,
                                  const OwnRows<ByKey>& own, int first) {
  using Element = typename M::Element;
  constexpr int kChunk = 16 / sizeof(Element), kChunks = DC / kChunk;
  const int lane = thread_index() % kWarp;
  sync_warp();
  NATTEN_EXT_UNROLL
  for (int n = 0; n < DC / 8; ++n) {
    NATTEN_EXT_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int channel = 8 * n + lane % 4 * 2;
      store_pair<Element>(scratch + own.slot_of(lane / 4 + 8 * h) * kPitch<M, D> + channel * static_cast<uint32_t>(sizeof(Element)),
                          acc[n][2 * h] * factor[h], acc[n][2 * h + 1] * factor[h]);
    }
  }
  sync_warp();
  for (int i = lane; i < kWarpRows * kChunks; i += kWarp) {
    const int row = i / kChunks, channel = i % kChunks * kChunk;
    const int warp_y = own.y[0], y = warp_y + row / kBlock, x = own.x - lane / 4 + row % kBlock;
    const int bytes = (p.head_dim - first - channel) * static_cast<int>(sizeof(Element));
    if (bytes <= 0 || !tile.owns(y, x)) continue;
    auto* to = reinterpret_cast<unsigned char*>(static_cast<Element*>(t.data) + tile.offset(t, y, x) + first + channel);
    const Shared from =
        scratch + own.slot_of(row) * kPitch<M, D> + channel * static_cast<uint32_t>(sizeof(Element));
    if (p.output_vector_bytes == 16) {
      store_global(reinterpret_cast<Vector16*>(to), load_shared<Vector16>(from));
    } else {
      for (int b = 0; b < 16 && b < bytes; b += sizeof(Element)) {
        store_global(reinterpret_cast<Element*>(to + b), load_shared<Element>(from + b));
      }
    }
  }
}

}  // namespace natten_ext::cuda
