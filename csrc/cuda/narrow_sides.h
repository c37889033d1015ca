// The two sides of each order for windows of 7 x 7 keys: their tiles, and the shared memory that they need. One leaves numbers of queries in
// a form that only the other knows (narrow_numbers.h), so a GPU must have room for both.
#pragma once

#include "narrow_keys.h"
#include "narrow_queries.h"

namespace natten_ext::cuda {

template <class M, int Dim, bool Whole>
using BackwardQueries = NarrowQueries<M, NarrowTile<Dim, Whole>, 3, NarrowTile<Dim, Whole>::kOwn, Dim == 8>;
template <class M, int Dim, bool Whole>
using BackwardKeys = NarrowKeys<M, NarrowTile<Dim, Whole>, false, Dim == 8>;

// Where things lie on the query-centred side: behind the table the cotangents of keys and values, then own rows.
template <int Dim, bool Whole>
struct NarrowDoubleBackwardQueryPlaces {
  // Tiles are small, so that several blocks fit a multiprocessor: of 32 channels two, else three.
  using Tile = NarrowTile<Dim, Whole, 4, Dim == 8 ? 4 : 2>;
  static constexpr Shared kCotKeys = Tile::kOwn, kCotValues = kCotKeys + Tile::kSlots * Tile::kBytes;
  static constexpr Shared kOwn = kCotValues + (Tile::kSlots + 8) * Tile::kBytes;
};
template <class M, class Places>
using DoubleBackwardQueries = NarrowQueries<M, typename Places::Tile, 4, Places::kOwn, true>;

// A tile must have 16 rows: of 12 or 13 rows all see the keys in the middle.
template <int Dim, bool Whole>
using DoubleBackwardKeyTile = NarrowTile<Dim, Whole, Dim == 32 && !Whole ? 8 : 4, Dim == 32 ? 2 : 4>;
template <class M, int Dim, bool Whole>
using DoubleBackwardKeys = NarrowKeys<M, DoubleBackwardKeyTile<Dim, Whole>, true, !(Dim == 16 && Whole)>;

template <class M, int Dim, bool Whole>
constexpr uint32_t kBackwardShared = std::max(BackwardQueries<M, Dim, Whole>::kShared, BackwardKeys<M, Dim, Whole>::kShared);
template <class M, int Dim, bool Whole>
constexpr uint32_t kDoubleBackwardShared = std::max(DoubleBackwardQueries<M, NarrowDoubleBackwardQueryPlaces<Dim, Whole>>::kShared,
                                                    DoubleBackwardKeys<M, Dim, Whole>::kShared);

}  // namespace natten_ext::cuda
