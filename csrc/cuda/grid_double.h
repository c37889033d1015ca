// What both sides of the double backward of grids of 16 x 16 windows share (grid.h). Heads may be wide, and of any number of chunks.
//
// A warp has a row of 16 own positions at a time, as left operands in registers. A block has all of its window's rows that are
// staged; they are met a row of 16 after the other. So all pairs of two rows have one vertical offset.
#pragma once

#include "grid.h"

namespace natten_ext::cuda {

// Rows of `Dim` channels lie an odd number of chunks apart, so that those of eight rows lie in different banks.
template <int Dim>
struct PitchedTile {
  static constexpr int kDim = Dim, kWarps = 8, kThreads = kWarps * kWarp;
  static constexpr int kSlots = kGridWindow * kGridWindow, kGroups = kGridWindow / kWarps;  // kGroups: own rows of a warp
  static constexpr int kChunks = Dim / 8;
  static constexpr Shared kPitch = 16 * (kChunks | 1), kRowBytes = kGridWindow * kPitch, kRegion = kSlots * kPitch;
  // The table, as GridTile has it.
  static constexpr int kTableExtent = GridTile<8, kWarps>::kTableExtent;
  static constexpr Shared kTableRow = GridTile<8, kWarps>::kTableRow, kShifted = GridTile<8, kWarps>::kShifted;
  static constexpr Shared kTableBytes = GridTile<8, kWarps>::kTableBytes;
};

// Starts the copies of a window of some tensors, to regions one after the other.
template <class Tile, int Count>
NATTEN_EXT_DEVICE void stage_pitched(const NarrowParams& p, const GridWindow& window, const ByteRows* const (&tensors)[Count]) {
  uint64_t origins[Count];
  NATTEN_EXT_UNROLL
  for (int i = 0; i < Count; ++i) origins[i] = window.address(*tensors[i], 0, 0);
  NATTEN_EXT_NO_UNROLL
  for (uint32_t item = narrow_thread(); item < Tile::kSlots * Tile::kChunks; item += Tile::kThreads) {
    const uint32_t slot = item / Tile::kChunks, chunk = item % Tile::kChunks;
    const bool exists = 16 * chunk < p.head_bytes;
    NATTEN_EXT_UNROLL
    for (int i = 0; i < Count; ++i) {
      const auto* from = reinterpret_cast<const void*>(
          advanced(advanced(origins[i] + 16 * chunk, slot / kGridWindow, tensors[i]->y), slot % kGridWindow, tensors[i]->x));
      const Shared to = i * Tile::kRegion + slot * Tile::kPitch + 16 * chunk;
      if (has_half_chunks<Tile>(p)) {
        copy_async<8>(to, from, true);
        copy_async<8>(to + 8, from, false);
      } else {
        copy_async<16>(to, from, exists);
      }
    }
  }
}

// A warp's row of a tensor as left operands: of chunk c, words 2c and 2c + 1 are those of positions g and g + 8 (g = lane / 4).
template <class M, int Dim>
struct OwnRow {
  using Element = typename M::Element;
  static constexpr int kChunks = Dim / 8;
  uint32_t words[2 * kChunks];

  // From global memory, in the places that the matrix units ask for.
  NATTEN_EXT_DEVICE void load(const NarrowParams& p, const GridWindow& window, const ByteRows& t, int row) {
    const uint32_t lane = narrow_lane(), in_chunk = lane % 4 * 4;
    NATTEN_EXT_UNROLL
    for (int h = 0; h < 2; ++h) {
      const unsigned char* from = window.pointer(t, row, lane / 4 + 8 * h) + in_chunk;
      NATTEN_EXT_UNROLL
      for (uint32_t c = 0; c < kChunks; ++c) {
        words[2 * c + h] = 16 * c + in_chunk < p.head_bytes ? load_global(reinterpret_cast<const uint32_t*>(from + 16 * c)) : 0;
      }
    }
  }
  // c += products with two chunks of eight staged positions, or with the last one alone.
  NATTEN_EXT_DEVICE void multiply(float (&c)[4], int step, uint32_t first, uint32_t second) const {
    if (step < kChunks / 2) cuda::multiply<Element>(c, reinterpret_cast<const uint32_t(&)[4]>(words[4 * step]), first, second);
    else cuda::multiply<Element>(c, reinterpret_cast<const uint32_t(&)[2]>(words[4 * step]), first);
  }
};

// Where a lane finds a staged row's matrices.
template <class M, class Tile>
struct StagedRow {
  using Element = typename M::Element;
  static constexpr int kChunks = Tile::kChunks, kPairs = kChunks / 2;
  static constexpr bool kOdd = kChunks % 2 != 0;
  Shared of_scores, of_results;  // of two chunks of 8 positions after the other 8; of 16 positions' chunk after the other

  NATTEN_EXT_DEVICE StagedRow() {
    const uint32_t lane = narrow_lane();
    of_scores = (lane / 16 * 8 + lane % 8) * Tile::kPitch + lane / 8 % 2 * 16;
    of_results = (lane / 8 % 2 * 8 + lane % 8) * Tile::kPitch + lane / 16 * 16;
  }
  NATTEN_EXT_DEVICE void advance() {
    of_scores += Tile::kRowBytes;
    of_results += Tile::kRowBytes;
  }
  // Calls `use(step, block, first, second)` for every two chunks of each of the row's blocks in a region, and for the last one alone.
  template <class Use>
  NATTEN_EXT_DEVICE void for_each_step(Shared region, Use use) const {
    NATTEN_EXT_UNROLL
    for (int i = 0; i < kPairs; ++i) {
      uint32_t words[4];
      load_matrices(words, region + of_scores + 32 * i);
      use(i, 0, words[0], words[1]);
      use(i, 1, words[2], words[3]);
    }
    if constexpr (kOdd) {
      uint32_t words[2];
      load_matrices(words, region + of_results + 32 * kPairs);
      use(kPairs, 0, words[0], 0u);
      use(kPairs, 1, words[1], 0u);
    }
  }
  // acc += weights times the row of a region.
  NATTEN_EXT_DEVICE void accumulate(float (&acc)[kChunks][4], const uint32_t (&weights)[4], Shared region) const {
    NATTEN_EXT_UNROLL
    for (int i = 0; i < kPairs; ++i) {
      uint32_t words[4];
      load_matrices_transposed(words, region + of_results + 32 * i);
      multiply<Element>(acc[2 * i], weights, words[0], words[1]);
      multiply<Element>(acc[2 * i + 1], weights, words[2], words[3]);
    }
    if constexpr (kOdd) {
      uint32_t words[2];
      load_matrices_transposed(words, region + of_results + 32 * kPairs);
      multiply<Element>(acc[2 * kPairs], weights, words[0], words[1]);
    }
  }
};

// The table's entries of a lane's pairs of an own row with a staged one. Block b and position g + 8h have those number 1 + b - h.
// `ByKey`: own positions are keys, and offsets the other way round.
template <class Tile, bool ByKey>
struct RowEntries {
  struct alignas(8) Pair {
    float e[2];
  };
  static constexpr Shared kStep = ByKey ? Shared{0} - Tile::kTableRow : Tile::kTableRow;  // to those of the next staged row
  Pair pairs[3];

  // Where those of the first staged row lie.
  NATTEN_EXT_DEVICE static Shared first(int row, Shared table) {
    const int g = static_cast<int>(narrow_lane() / 4), t = static_cast<int>(narrow_lane() % 4), last = kGridWindow - 1;
    const int column = ByKey ? last - 1 - 2 * t + g : last + 2 * t - g;  // of the entries between, the lower one
    const int copy = column % 2 * (static_cast<int>(Tile::kShifted) - static_cast<int>(sizeof(float)));
    return table + (ByKey ? last + row : last - row) * Tile::kTableRow + column * static_cast<int>(sizeof(float)) + copy;
  }
  NATTEN_EXT_DEVICE explicit RowEntries(Shared address) {
    NATTEN_EXT_UNROLL
    for (int i = 0; i < 3; ++i) pairs[i] = load_shared<Pair>(address + 8 * (ByKey ? 1 - i : i - 1) * static_cast<int>(sizeof(float)));
  }
  // Element e of block b, as products have them.
  NATTEN_EXT_DEVICE float of(int b, int e) const { return pairs[1 + b - e / 2].e[ByKey ? 1 - e % 2 : e % 2]; }
};

// Writes `factor` times results of a warp's row.
template <class Element, int Chunks>
NATTEN_EXT_DEVICE void write_row(const float (&acc)[Chunks][4], float factor, const NarrowParams& p, const GridWindow& window,
                                 const ByteRows& t, int row) {
  const uint32_t lane = narrow_lane(), in_chunk = lane % 4 * 4;
  NATTEN_EXT_UNROLL
  for (int h = 0; h < 2; ++h) {
    unsigned char* to = window.pointer(t, row, lane / 4 + 8 * h) + in_chunk;
    NATTEN_EXT_UNROLL
    for (uint32_t n = 0; n < Chunks; ++n) {
      if (16 * n + in_chunk >= p.head_bytes) continue;
      store_global(reinterpret_cast<uint32_t*>(to + 16 * n), pack<Element>(acc[n][2 * h] * factor, acc[n][2 * h + 1] * factor));
    }
  }
}

// Numbers of each query that the query-centred kernel leaves for the key-centred one, an array of a head for each: D less y, r, t.
enum GridNumber { kGridD, kGridR, kGridT };
NATTEN_EXT_DEVICE float* grid_number(const NarrowParams& p, const GridWindow& window, GridNumber which, int row, int column) {
  auto* of_head = p.row_numbers.data + advanced(advanced(0, window.batch, p.row_numbers.batch), window.head, p.row_numbers.head);
  return reinterpret_cast<float*>(of_head) + (which * p.height + window.y + row) * p.width + window.x + column;
}

}  // namespace natten_ext::cuda
