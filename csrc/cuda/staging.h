// Between global and shared memory: tiles and pieces come in by asynchronous copies, results leave through a warp's
// own part of shared memory in wide stores.
#pragma once

#include "products.h"

namespace natten_ext::cuda {

// Copies up to 16 bytes of a row, of which `bytes` exist; zeros after them. `width`: what the row's alignment allows.
template <class Element>
NATTEN_EXT_DEVICE void copy_chunk(Shared destination, const unsigned char* from, int bytes, int width) {
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

// Starts copying the rows of a rectangle of a tensor, one slot after the other; zeros where `exists(y, x)` says that the map
// has no row. `whole`: it has all of them.
template <class M, int Dim, class AnyTile, class Exists>
NATTEN_EXT_DEVICE void stage_rows(Shared destination, const Rows& t, const Params& p, const AnyTile& tile, const Rectangle& r,
                                  const SlotDivisor& by_width, bool whole, Exists exists) {
  using Element = typename M::Element;
  constexpr int kSize = sizeof(Element), kChunk = 16 / kSize, kChunks = Dim / kChunk;
  constexpr int kAcross = kChunks < kWarp ? kChunks : kWarp;  // threads next to each other that share a row
  const int first = thread_index() / kAcross, step = block_threads() / kAcross, slots = r.height() * r.width();
  if (first >= step) return;
  const uint32_t own = thread_index() % kAcross * 16;
  const int bytes = p.head_dim * kSize - static_cast<int>(own);
  const auto* data = static_cast<const unsigned char*>(t.data) + own;
  const auto for_each_slot = [&](auto copy) {
    for (int slot = first; slot < slots; slot += step) {
      const int row = by_width(slot), column = slot - row * r.width();
      NATTEN_EXT_UNROLL
      for (int chunk = 0; chunk < kChunks * 16; chunk += kAcross * 16) {
        copy(destination + own + slot * kPitch<M, Dim> + chunk, row, column, chunk);
      }
    }
  };
  if (p.wide_copies && whole) {
    const auto origin = reinterpret_cast<uint64_t>(data) + tile.short_offset(t, r.z, r.y0, r.x0, kSize);
    const uint32_t step_y = static_cast<uint32_t>(t.y) * tile.window.dilation_y * kSize;
    const uint32_t step_x = static_cast<uint32_t>(t.x) * tile.window.dilation_x * kSize;
    for_each_slot([&](Shared to, int row, int column, int chunk) {
      const uint64_t from = multiply_add_wide(column, step_x, multiply_add_wide(row, step_y, origin));
      copy_async<16>(to, reinterpret_cast<const unsigned char*>(from) + chunk, chunk < bytes);
    });
  } else {
    const int64_t step_y = t.y * tile.window.dilation_y, step_x = t.x * tile.window.dilation_x;
    const auto* origin = data + tile.offset(t, r.z, r.y0, r.x0) * kSize;
    for_each_slot([&](Shared to, int row, int column, int chunk) {
      copy_chunk<Element>(to, origin + (row * step_y + column * step_x) * kSize + chunk,
                          exists(r.y0 + row, r.x0 + column) ? bytes - chunk : 0, p.vector_bytes);
    });
  }
}

// The same for the N numbers of each row in p.row_numbers.
template <class Real, int N, class AnyTile, class Exists>
NATTEN_EXT_DEVICE void stage_row_numbers(Shared destination, const Params& p, const AnyTile& tile, const Rectangle& r,
                                         const SlotDivisor& by_width, Exists exists) {
  constexpr int kBytes = N * sizeof(Real), kChunks = kBytes / 16;
  const int total = r.height() * r.width() * kChunks, step_y = p.queries.width * tile.window.dilation_y;
  const auto* origin = static_cast<const unsigned char*>(p.row_numbers) + tile.row_index(p, r.z, r.y0, r.x0) * kBytes;
  for (int i = thread_index(); i < total; i += block_threads()) {
    const int slot = i / kChunks, row = by_width(slot), column = slot - row * r.width();
    const bool valid = exists(r.y0 + row, r.x0 + column);
    const int index = valid ? row * step_y + column * tile.window.dilation_x : 0;
    copy_async<16>(destination + i * 16, origin + int64_t{index} * kBytes + i % kChunks * 16, valid);
  }
}

// Starts copying a tile's own rows of p.own[0] to p.own[Count - 1], as far as they are given.
template <class M, int Dim, int Count, class S>
NATTEN_EXT_DEVICE void stage_own(const Params& p, const Tile<S>& tile) {
  const int width = Tile<S>::tile_width(p);
  const Rectangle r{tile.origin_y, tile.origin_y + Tile<S>::tile_height(p), tile.origin_x, tile.origin_x + width, tile.z};
  const auto exists = [&](int y, int x) { return tile.owns(y, x); };
  const bool whole = r.x1 <= tile.own_width() && exists(r.y1 - 1, r.x1 - 1);
  NATTEN_EXT_NO_UNROLL
  for (int i = 0; i < Count; ++i) {
    if (p.own[i].data != nullptr) stage_rows<M, Dim>(p.shared.own(i), p.own[i], p, tile, r, SlotDivisor(width), whole, exists);
  }
}

// Starts copying rows of keys at the places of a warp's own queries to the warp's rows of a tile; where there is none, the
// nearest. `await_own_keys` ends what began.
template <class M, int Dim, class S>
NATTEN_EXT_DEVICE void stage_own_keys(Shared destination, const Rows& keys, const Params& p, const Tile<S>& tile,
                                      const OwnRows<S>& own) {
  using Element = typename M::Element;
  constexpr int kChunk = 16 / sizeof(Element), kChunks = Dim / kChunk;
  const int lane = thread_index() % kWarp;
  NATTEN_EXT_NO_UNROLL
  for (int i = lane; i < kWarpRows * kChunks; i += kWarp) {
    const int row = i / kChunks, channel = i % kChunks * kChunk;
    int y = lesser(own.row_y(row), tile.own_height() - 1), x = lesser(own.row_x(row), tile.own_width() - 1);
    if (p.kind == Kind::full) {
      const int token = lesser(y * kBlock + x, p.keys.count - 1);
      y = token / kBlock, x = token % kBlock;
    }
    const auto* from = reinterpret_cast<const unsigned char*>(static_cast<const Element*>(keys.data) + tile.offset(keys, tile.z, y, x) + channel);
    copy_chunk<Element>(destination + own.slot_of(row) * kPitch<M, Dim> + channel * static_cast<uint32_t>(sizeof(Element)), from,
               own.any ? (p.head_dim - channel) * static_cast<int>(sizeof(Element)) : 0, p.vector_bytes);
  }
}
NATTEN_EXT_DEVICE void await_own_keys() {
  copy_async_commit();
  copy_async_wait<0>();
  sync_warp();
}

// The same for a piece: p.staged[0] and on, and `Numbers` numbers of each row.
template <class M, int Dim, int Tensors, int Numbers, class S>
NATTEN_EXT_DEVICE void stage_piece(int stage, const Params& p, const Tile<S>& tile, const Rectangle& piece) {
  const SlotDivisor by_width(piece.width());
  // Windows lie inside the map. But the last row of a sequence may be short.
  const auto exists = [&](int y, int x) { return S::kGeneral || y * tile.other.width + x < tile.other.count; };
  const bool whole = exists(piece.y1 - 1, piece.x1 - 1);
  NATTEN_EXT_NO_UNROLL
  for (int i = 0; i < Tensors; ++i) {
    if (p.staged[i].data != nullptr) stage_rows<M, Dim>(p.shared.rows(stage, i), p.staged[i], p, tile, piece, by_width, whole, exists);
  }
  if constexpr (Numbers > 0) stage_row_numbers<typename M::Real, Numbers>(p.shared.scalars(stage, 0), p, tile, piece, by_width, exists);
}

NATTEN_EXT_DEVICE void copy_async_wait_for(int pending) {
  if (pending == 0) copy_async_wait<0>();
  else copy_async_wait<1>();
}

// Runs `consume(piece, stage)` on every piece while `issue(piece, stage)` starts the copies of later ones. Copies that
// the caller has started before arrive with the first piece.
template <class Issue, class Consume>
NATTEN_EXT_DEVICE void for_each_piece(int count, int stages, Issue issue, Consume consume) {
  const int ahead = stages - 1;  // 0 or 1
  NATTEN_EXT_NO_UNROLL
  for (int i = -ahead; i < count; ++i) {
    if (i + ahead < count) issue(i + ahead, (i + ahead) & ahead);
    copy_async_commit();
    if (i < 0) continue;
    copy_async_wait_for(ahead);
    sync_block();
    consume(i, i & ahead);
    sync_block();  // the stage is free again
  }
}

// 16 adjacent rows of a piece from `first` on, as far as they were staged.
struct AdjacentSlots {
  int first, last;
  NATTEN_EXT_DEVICE int slot_of(int row) const { return lesser(first + row, last); }
};

// Writes factor * (a row . b row) for every row of a staged piece.
template <class M, int Dim>
NATTEN_EXT_DEVICE void write_row_products(Shared destination, Shared a, Shared b, const Rectangle& piece,
                                          typename M::Real factor) {
  using Real = typename M::Real;
  const int lane = thread_index() % kWarp, rows = piece.height() * piece.width();
  NATTEN_EXT_NO_UNROLL
  for (int first = thread_index() / kWarp * kWarpRows; first < rows; first += block_threads() / kWarp * kWarpRows) {
    Real products[2];
    row_products<M, Dim>(products, a, b, AdjacentSlots{first, rows - 1});
    for (int h = 0; h < 2; ++h) {
      const int slot = first + lane / 4 + 8 * h;
      if (lane % 4 == 0 && slot < rows) store_shared(destination + slot * static_cast<uint32_t>(sizeof(Real)), factor * products[h]);
    }
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

// Writes a warp's 16 x Channels results, times `factor`, to channels `first` and on of its own rows. `scratch` is a tile in
// shared memory whose rows of this warp nobody needs any more.
template <class M, int Dim, int Channels, class S>
NATTEN_EXT_DEVICE void write_rows(const typename M::Real (&acc)[Channels / 8][4], const typename M::Real (&factor)[2],
                                  const Rows& t, Shared scratch, const Params& p, const Tile<S>& tile, const OwnRows<S>& own,
                                  int first) {
  using Element = typename M::Element;
  constexpr int kChunk = 16 / sizeof(Element), kChunks = Channels / kChunk;
  const int lane = thread_index() % kWarp;
  sync_warp();
  NATTEN_EXT_UNROLL
  for (int n = 0; n < Channels / 8; ++n) {
    NATTEN_EXT_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int channel = 8 * n + lane % 4 * 2;
      store_pair<Element>(scratch + own.slot_of(lane / 4 + 8 * h) * kPitch<M, Dim> + channel * static_cast<uint32_t>(sizeof(Element)),
                          acc[n][2 * h] * factor[h], acc[n][2 * h + 1] * factor[h]);
    }
  }
  sync_warp();
  const int y0 = own.y[0], x0 = own.x - lane / 4;
  auto* origin = static_cast<Element*>(t.data) + tile.offset(t, tile.z, y0, x0) + first;
  const int64_t step_y = t.y * tile.window.dilation_y, step_x = t.x * tile.window.dilation_x;
  const int64_t to_second = own.step_y * step_y + own.step_x * step_x;
  for (int i = lane; i < kWarpRows * kChunks; i += kWarp) {
    const int row = i / kChunks, channel = i % kChunks * kChunk;
    const int bytes = (p.head_dim - first - channel) * static_cast<int>(sizeof(Element));
    if (bytes <= 0 || !tile.owns(own.row_y(row), own.row_x(row))) continue;
    auto* to = reinterpret_cast<unsigned char*>(origin + (row < kBlock ? 0 : to_second) + row % kBlock * step_x + channel);
    const Shared from =
        scratch + own.slot_of(row) * kPitch<M, Dim> + channel * static_cast<uint32_t>(sizeof(Element));
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
