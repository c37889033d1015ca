// Full self-attention of short sequences in half precision, as ViTGAN's discriminator has it (65 tokens): how the kernels made for
// it stage a sequence, and the products they are made of. docs/cuda.md ("Short sequences") explains why.
//
// A block has one sequence of a head, all of it staged at once. Each warp has a *group* of 16 queries, and then of 16 keys; the last
// group has 8. Beyond the sequence are rows of zeros: keys there have an infinite norm, so their weights are zero.
#pragma once

#include "kernel.h"
#include "narrow.h"
#include "rows.h"

namespace natten_ext::cuda {

struct ShortParams : NarrowParams {
  int tokens;
  bool l2;
};

// Scores of a group with all keys, or what becomes of them: of block b, keys 8 b and on.
constexpr int kShortBlocks = 9;
using ShortPairs = float[kShortBlocks][4];

// Where things lie in a block's shared memory: rows of tensors, those of pairs (left operands, one for each query), and numbers.
template <class M, int Dim>
struct ShortTile {
  static constexpr int kRows = kShortBlocks * kBlock, kWarps = (kRows + kWarpRows - 1) / kWarpRows, kThreads = kWarps * kWarp;
  static constexpr uint32_t kChunks = Dim / 8;
  static constexpr Shared kRow = kPitch<M, Dim>, kRegion = kRows * kRow;
  static constexpr Shared kPairRow = kRows * sizeof(typename M::Element), kPairs = kRows * kPairRow;
  static constexpr Shared kNumbers = kRows * sizeof(float);
  static_assert(kPairRow / 16 % 2 == 1, "so that eight rows lie in different banks");
};

// Blocks of so many bytes of shared memory on a multiprocessor, where the code for sm_80 runs, and elsewhere; `most`: as far as registers go.
constexpr int short_blocks_at_a_time(uint32_t bytes, int most) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  constexpr uint32_t kRoom = 164 * 1024;
#else
  constexpr uint32_t kRoom = 228 * 1024;
#endif
  const int fit = static_cast<int>(kRoom / (bytes + 1024));
  return fit < most ? fit : most;
}

// The block's sequence, found out again wherever one is made: that saves registers.
struct ShortSequence {
  int batch, head;

  NATTEN_EXT_DEVICE explicit ShortSequence(const ShortParams& p) {
    const int index = forget(block_x());
    batch = p.by_launch_heads(index), head = index - batch * p.heads;
  }
  NATTEN_EXT_DEVICE uint64_t address(const ByteRows& t, int token) const {
    return advanced(advanced(advanced(reinterpret_cast<uint64_t>(t.data), batch, t.batch), head, t.head), token, t.x);
  }
};

// Starts the copies of a sequence of some tensors, each to its region. A thread has a chunk of every so many rows.
template <class M, int Dim, int Count>
NATTEN_EXT_DEVICE void stage_sequence(const ShortParams& p, const ByteRows* const (&tensors)[Count], const Shared (&regions)[Count]) {
  using Tile = ShortTile<M, Dim>;
  const ShortSequence sequence(p);
  constexpr int kApart = Tile::kThreads / Tile::kChunks;
  const uint32_t chunk = narrow_thread() % Tile::kChunks;
  const int first = static_cast<int>(narrow_thread() / Tile::kChunks);
  const bool exists = 16 * chunk < p.head_bytes;
  if (first >= kApart) return;
  NATTEN_EXT_UNROLL
  for (int i = 0; i < Count; ++i) {
    uint64_t from = sequence.address(*tensors[i], first) + 16 * chunk;
    NATTEN_EXT_UNROLL
    for (int row = 0; row < Tile::kRows; row += kApart) {
      if (row + kApart <= Tile::kRows || row + first < Tile::kRows) {
        copy_async<16>(regions[i] + (row + first) * Tile::kRow + 16 * chunk, reinterpret_cast<const void*>(from), exists && row + first < p.tokens);
      }
      from = advanced(from, kApart, tensors[i]->x);
    }
  }
}

// The warp's 16 rows, of queries or of keys. In fragments a lane has rows g and g + 8 (g = lane / 4).
template <class M, int Dim>
struct ShortGroup {
  using Tile = ShortTile<M, Dim>;
  int first;
  bool exists[2];  // the lane's rows

  NATTEN_EXT_DEVICE explicit ShortGroup(const ShortParams& p) : first(static_cast<int>(narrow_thread() / kWarp) * kWarpRows) {
    for (int h = 0; h < 2; ++h) exists[h] = row(h) < p.tokens;
  }
  NATTEN_EXT_DEVICE int row(int h) const { return first + static_cast<int>(narrow_lane() / 4) + 8 * h; }
  // Rows that are not staged read the last.
  NATTEN_EXT_DEVICE int slot_of(int row) const { return lesser(first + row, Tile::kRows - 1); }
  // Whether the lane's row h is staged.
  NATTEN_EXT_DEVICE bool staged(int h) const { return h == 0 || first + 8 < Tile::kRows; }

  // What an array (batch, heads, tokens) has for the lane's rows; 0 without one, or without the row.
  NATTEN_EXT_DEVICE void load_numbers(float (&numbers)[2], const ShortParams& p, const void* source) const {
    for (int h = 0; h < 2; ++h) {
      numbers[h] = source != nullptr && exists[h] ? load_global(static_cast<const float*>(source) + number_index(p, h)) : 0;
    }
  }
  NATTEN_EXT_DEVICE uint64_t number_index(const ShortParams& p, int h) const { return multiply_add_wide(block_x(), p.tokens, row(h)); }

  // Writes `factor` times results, by way of the group's rows in a region, where nobody needs these any more, as a barrier says: so
  // they leave in 16 bytes at a time.
  NATTEN_EXT_DEVICE void write(const float (&acc)[Tile::kChunks][4], const float (&factor)[2], const ShortParams& p, const ByteRows& t,
                               Shared region) const {
    using Element = typename M::Element;
    const uint32_t lane = narrow_lane();
    NATTEN_EXT_UNROLL
    for (int h = 0; h < 2; ++h) {
      if (!staged(h)) break;
      NATTEN_EXT_UNROLL
      for (int n = 0; n < static_cast<int>(Tile::kChunks); ++n) {
        store_shared(region + row(h) * Tile::kRow + 16 * n + lane % 4 * 4, pack<Element>(acc[n][2 * h] * factor[h], acc[n][2 * h + 1] * factor[h]));
      }
    }
    sync_warp();
    constexpr int kApart = kWarp / Tile::kChunks;
    const uint32_t chunk = lane % Tile::kChunks;
    const int begin = static_cast<int>(lane / Tile::kChunks);
    if (begin >= kApart || 16 * chunk >= p.head_bytes) return;
    uint64_t to = ShortSequence(p).address(t, first + begin) + 16 * chunk;
    const Shared from = region + (first + begin) * Tile::kRow + 16 * chunk;
    NATTEN_EXT_UNROLL
    for (int i = 0; i < kWarpRows; i += kApart) {
      if (i + begin < kWarpRows && first + i + begin < p.tokens) store_global(to, load_shared<Vector16>(from + i * Tile::kRow));
      to = advanced(to, kApart, t.x);
    }
  }

  // Stores weights of the group with a block of keys, as the products that follow see them; zeros of queries that don't exist.
  NATTEN_EXT_DEVICE void store(Shared region, int block, const float (&weights)[4]) const {
    NATTEN_EXT_UNROLL
    for (int h = 0; h < 2; ++h) {
      if (!staged(h)) break;
      const uint32_t packed = pack<typename M::Element>(weights[2 * h], weights[2 * h + 1]);
      store_shared(region + row(h) * Tile::kPairRow + 16 * block + narrow_lane() % 4 * 4, exists[h] ? packed : 0);
    }
  }
};

// c += products of a group's rows with all staged ones, by the operations of `scores`.
template <class M, int Dim>
NATTEN_EXT_DEVICE void add_products(ShortPairs& c, Shared own, Shared staged, const ShortGroup<M, Dim>& group) {
  using Element = typename M::Element;
  const LeftRows<M, Dim> left(own, group);
  const Shared row = staged + narrow_lane() % 8 * ShortTile<M, Dim>::kRow + narrow_lane() / 8 * 16;
  NATTEN_EXT_UNROLL
  for (int k = 0; k < Dim / 32; ++k) {
    typename LeftRows<M, Dim>::Fragment first, second;
    left.step(2 * k, first);
    left.step(2 * k + 1, second);
    NATTEN_EXT_UNROLL
    for (int b = 0; b < kShortBlocks; ++b) {
      uint32_t words[4];
      load_matrices(words, row + 8 * b * ShortTile<M, Dim>::kRow + 64 * k);
      multiply<Element>(c[b], first[0], words[0], words[1]);
      multiply<Element>(c[b], second[0], words[2], words[3]);
    }
  }
}

// Weights of a group, 16 staged rows at a time: as left operands, from where `store` left them. `ByKey`: of a group of keys.
template <class M, int Dim, bool ByKey>
struct StoredPairs {
  using Tile = ShortTile<M, Dim>;
  Shared address, last;

  NATTEN_EXT_DEVICE StoredPairs(Shared region, const ShortGroup<M, Dim>& group) {
    const int lane = static_cast<int>(narrow_lane());
    if constexpr (ByKey) {
      const int chunk = lesser(group.first / 8 + lane / 8 % 2, kShortBlocks - 1);
      address = region + (lane % 8 + lane / 16 * 8) * Tile::kPairRow + chunk * 16;
      last = region + (Tile::kRows - 8 + lane % 8) * Tile::kPairRow + chunk * 16;
    } else {
      const Shared row = region + group.slot_of(lane % 16) * Tile::kPairRow;
      address = row + lane / 16 * 16;
      last = row + (kShortBlocks - 1) * 16;
    }
  }
  NATTEN_EXT_DEVICE void load(uint32_t (&left)[4], int step) const {
    if constexpr (ByKey) load_matrices_transposed(left, address + step * kWarpRows * Tile::kPairRow);
    else load_matrices(left, address + step * 32);
  }
  // Those of the last eight.
  NATTEN_EXT_DEVICE void load(uint32_t (&left)[2]) const {
    if constexpr (ByKey) load_matrices_transposed(left, last);
    else load_matrices(left, last);
  }
};

// And as they are in registers.
template <class M>
struct HeldPairs {
  uint32_t words[kShortBlocks][2];

  NATTEN_EXT_DEVICE explicit HeldPairs(const ShortPairs& pairs) {
    NATTEN_EXT_UNROLL
    for (int i = 0; i < 2 * kShortBlocks; ++i) words[i / 2][i % 2] = pack<typename M::Element>(pairs[i / 2][i % 2 * 2], pairs[i / 2][i % 2 * 2 + 1]);
  }
  NATTEN_EXT_DEVICE void load(uint32_t (&left)[4], int step) const {
    NATTEN_EXT_UNROLL
    for (int i = 0; i < 4; ++i) left[i] = words[2 * step + i / 2][i % 2];
  }
  NATTEN_EXT_DEVICE void load(uint32_t (&left)[2]) const { left[0] = words[kShortBlocks - 1][0], left[1] = words[kShortBlocks - 1][1]; }
};

// Sums over all staged rows of weights times rows, and of the weights, rounded as in the products.
template <class M, int Dim>
struct ShortSums {
  using Element = typename M::Element;
  using Tile = ShortTile<M, Dim>;
  float acc[Tile::kChunks][4];

  NATTEN_EXT_DEVICE ShortSums() { clear(acc); }

  template <class Left>
  NATTEN_EXT_DEVICE void add(const Left& weights, Shared rows) {
    float totals[2];
    add_to<false>(totals, weights, rows);
  }
  template <class Left>
  NATTEN_EXT_DEVICE void add(float (&totals)[2], const Left& weights, Shared rows) { add_to<true>(totals, weights, rows); }

  // acc -= total * row of the group's rows in a region: subtract_rows (rows.h), without rounding rows again.
  NATTEN_EXT_DEVICE void subtract(const float (&totals)[2], Shared region, const ShortGroup<M, Dim>& group) {
    struct alignas(4) Pair {
      Element e[2];
    };
    NATTEN_EXT_UNROLL
    for (int h = 0; h < 2; ++h) {
      const Shared row = region + group.slot_of(narrow_lane() / 4 + 8 * h) * Tile::kRow + narrow_lane() % 4 * 4;
      NATTEN_EXT_UNROLL
      for (int n = 0; n < static_cast<int>(Tile::kChunks); ++n) {
        const Pair pair = load_shared<Pair>(row + 16 * n);
        NATTEN_EXT_UNROLL
        for (int e = 0; e < 2; ++e) acc[n][2 * h + e] = fused_multiply_add(-totals[h], widen(pair.e[e]), acc[n][2 * h + e]);
      }
    }
  }

 private:
  template <bool Totals, class Left>
  NATTEN_EXT_DEVICE void add_to(float (&totals)[2], const Left& weights, Shared rows) {
    const uint32_t lane = narrow_lane(), ones = pack<Element>(1, 1);
    float sums[4] = {0, 0, 0, 0};
    const Shared row = rows + lane % 16 * Tile::kRow + lane / 16 * 16;
    NATTEN_EXT_UNROLL
    for (int step = 0; step < kShortBlocks / 2; ++step) {
      uint32_t left[4];
      weights.load(left, step);
      NATTEN_EXT_UNROLL
      for (int n = 0; n < static_cast<int>(Tile::kChunks); n += 2) {
        uint32_t words[4];
        load_matrices_transposed(words, row + step * kWarpRows * Tile::kRow + 16 * n);
        multiply<Element>(acc[n], left, words[0], words[1]);
        multiply<Element>(acc[n + 1], left, words[2], words[3]);
      }
      if constexpr (Totals) multiply<Element>(sums, left, ones, ones);
    }
    uint32_t left[2];
    weights.load(left);
    const Shared last = rows + (Tile::kRows - 8 + lane % 8) * Tile::kRow + lane / 8 * 16;
    NATTEN_EXT_UNROLL
    for (int n = 0; n < static_cast<int>(Tile::kChunks); n += 4) {
      uint32_t words[4];
      load_matrices_transposed(words, last + 16 * n);
      NATTEN_EXT_UNROLL
      for (int i = 0; i < 4; ++i) multiply<Element>(acc[n + i], left, words[i]);
    }
    if constexpr (Totals) {
      multiply<Element>(sums, left, ones);
      totals[0] = sums[0], totals[1] = sums[2];
    }
  }
};

// What comes off products of queries and keys: of the group's queries, `of_row`, and of all keys, in shared memory. A barrier must follow.
// `left` and `right` are their regions: |q|^2 / 2 and |k|^2 / 2 with a factor of a half. Of dot scores there is nothing. Keys that don't
// exist have `beyond`.
template <class M, int Dim>
NATTEN_EXT_DEVICE void prepare_norms(float (&of_row)[2], Shared of_keys, const ShortParams& p, const ShortGroup<M, Dim>& group,
                                     const Shared (&queries)[2], const Shared (&keys)[2], float factor, float beyond) {
  float of_key[2] = {0, 0};
  of_row[0] = of_row[1] = 0;
  if (p.l2) {
    row_products<M, Dim>(of_row, queries[0], queries[1], group);
    row_products<M, Dim>(of_key, keys[0], keys[1], group);
  }
  for (int h = 0; h < 2; ++h) {
    of_row[h] *= factor;
    if (narrow_lane() % 4 == 0 && group.staged(h)) {
      store_shared(of_keys + group.row(h) * static_cast<Shared>(sizeof(float)), group.exists[h] ? of_key[h] * factor : beyond);
    }
  }
}

// From products to scores: factor * (product - norms), as finish_scores has them.
NATTEN_EXT_DEVICE void finish_pairs(ShortPairs& c, float factor, const float (&of_row)[2], Shared of_keys) {
  struct alignas(8) Pair {
    float e[2];
  };
  NATTEN_EXT_UNROLL
  for (int b = 0; b < kShortBlocks; ++b) {
    const Pair of_key = load_shared<Pair>(of_keys + (8 * b + narrow_lane() % 4 * 2) * static_cast<Shared>(sizeof(float)));
    NATTEN_EXT_UNROLL
    for (int e = 0; e < 4; ++e) c[b][e] = fused_multiply_add(c[b][e] - (of_row[e / 2] + of_key.e[e % 2]), factor, 0.0f);
  }
}

}  // namespace natten_ext::cuda
