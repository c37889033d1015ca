// Forward of windows of 7 x 7 keys (narrow.h). A warp forms the scores of a whole frame, takes the largest of each row, and
// only then exponentials and the product with the values.
#include "narrow_launch.h"

namespace natten_ext::cuda {

template <class M, int Dim, bool Whole>
struct NarrowForward {
  using Element = typename M::Element;
  using Tile = NarrowTile<Dim, Whole>;
  using Group = NarrowGroup<Dim, Whole>;
  using Columns = FrameColumns<Dim, Whole>;
  using Keys = FrameKeys<Dim, Whole>;
  using Values = FrameValues<Dim, Whole>;
  static constexpr int kBlocksAtATime = 2;  // on a multiprocessor
  static constexpr int kRows = Group::kFrameRows, kBlocks = Keys::kBlocks, kChunks = Dim / 8;
  static constexpr int kSteps = kChunks > 1 ? kChunks / 2 : 1, kRegisters = kChunks > 1 ? 4 : 2;  // of queries as left operands

  uint32_t query[kSteps][kRegisters];
  float acc[kChunks][4];
  float base[2], sum[2];

  NATTEN_EXT_DEVICE static void run(const NarrowParams& p) {
    const Tile tile(p);
    if (tile.empty()) return;
    stage_narrow_keys(p, tile);
    NATTEN_EXT_UNROLL
    for (int i = 0; i < Tile::kGroups; ++i) stage_queries(p, tile, Group(p, tile, i));
    copy_async_commit();
    fill_narrow_table<Element, Tile>(p, tile.head);
    copy_async_wait<0>();
    sync_block();
    NATTEN_EXT_NO_UNROLL
    for (int i = 0; i < Tile::kGroups; ++i) {
      const Group group(p, tile, i);
      if (group.empty()) continue;
      NarrowForward results;
      results.load_queries(group);
      const Columns columns(group);
      results.attend(p.factor, group, columns);
      // Zero times NaN is NaN: as in `with_care`.
      if (any_in_warp(!all_finite(results.acc))) results.attend_carefully(p.factor, group, columns);
      results.write(p, tile, group);
    }
  }

  NATTEN_EXT_DEVICE static void stage_queries(const NarrowParams& p, const Tile& tile, const Group& group) {
    group.for_each_chunk(p, tile, p.query, [&](uint32_t row, uint64_t from, Shared to, bool exists) {
      const bool valid = exists && inside(group.x + static_cast<int>(row % 8), group.width);
      copy_async<16>(to, reinterpret_cast<const void*>(from), valid);
    });
  }

  NATTEN_EXT_DEVICE void load_queries(const Group& group) {
    const uint32_t lane = narrow_lane();
    const Shared address = Tile::kQueries + Tile::place(group.queries + lane % 16, lane / 16 % kChunks);
    NATTEN_EXT_UNROLL
    for (int k = 0; k < kSteps; ++k) load_matrices(query[k], address ^ 32 * k);
  }

  // Products of queries and a frame row's keys, both blocks folded into one.
  NATTEN_EXT_DEVICE void products(float (&s)[4], const Keys& keys, int row, const Columns& columns) const {
    float c[kBlocks][4];
    clear(c);
    NATTEN_EXT_UNROLL
    for (int b = 0; b < kBlocks; ++b) {
      if constexpr (kChunks == 1) {
        multiply<Element>(c[b], query[0], keys.word(row, b, 0));
      } else {
        NATTEN_EXT_UNROLL
        for (int k = 0; k < kSteps; ++k) multiply<Element>(c[b], query[k], keys.word(row, b, 2 * k), keys.word(row, b, 2 * k + 1));
      }
    }
    NATTEN_EXT_UNROLL
    for (int e = 0; e < 4; ++e) s[e] = columns.second[e % 2] ? c[kBlocks - 1][e] : c[0][e];
  }

  // The largest of each row becomes its base. Returns what is taken off scores: the base, but 0 for rows without any.
  NATTEN_EXT_DEVICE void find_base(float (&largest)[2], float (&from)[2]) {
    NATTEN_EXT_UNROLL
    for (int h = 0; h < 2; ++h) {
      largest[h] = larger(largest[h], shuffle_xor(largest[h], 1));
      largest[h] = larger(largest[h], shuffle_xor(largest[h], 2));
      base[h] = largest[h];
      from[h] = base[h] == -kInfinity<float> ? 0 : base[h];
    }
  }

  NATTEN_EXT_DEVICE void attend(float factor, const Group& group, const Columns& columns) {
    constexpr float kNone = -kInfinity<float>;
    // Entries of frame row r for the upper queries are those of row r + 1 for the lower ones.
    float entries[kNarrowKernel + 1][2];
    NATTEN_EXT_UNROLL
    for (int c = 0; c < 2; ++c) {
      NATTEN_EXT_UNROLL
      for (int r = 0; r <= kNarrowKernel; ++r) entries[r][c] = load_shared<float>(columns.entry(c, r, 1));
      if (group.lower) entries[0][c] = kNone;
    }
    // Upper queries have the first seven rows. Only lower ones have the eighth, and only where their windows begin lower.
    const auto has = [](int r, int e) { return r < kNarrowKernel || e >= 2; };
    float s[kRows][4], largest[2] = {kNone, kNone};
    Keys keys(group.frame);
    NATTEN_EXT_UNROLL
    for (int r = 0; r < kRows; ++r) {
      NATTEN_EXT_UNROLL
      for (int e = 0; e < 4; ++e) s[r][e] = kNone;
      if (r == kNarrowKernel && !group.lower) continue;
      if (r % Keys::kRowsAtATime == 0) keys.load(r);
      float product[4];
      products(product, keys, r % Keys::kRowsAtATime, columns);
      NATTEN_EXT_UNROLL
      for (int e = 0; e < 4; ++e) {
        if (!has(r, e)) continue;
        s[r][e] = fused_multiply_add(product[e], factor, entries[r + 1 - e / 2][e % 2]);
        largest[e / 2] = larger(largest[e / 2], s[r][e]);
      }
    }
    float from[2];
    find_base(largest, from);
    clear(acc);
    sum[0] = sum[1] = 0;
    Values values(group.frame);
    uint32_t weights[kRows][2];
    NATTEN_EXT_UNROLL
    for (int r = 0; r < kRows; ++r) {
      if (r == kNarrowKernel && !group.lower) continue;
      float w[4] = {0, 0, 0, 0};
      NATTEN_EXT_UNROLL
      for (int e = 0; e < 4; ++e) {
        if (!has(r, e)) continue;
        w[e] = power_of_two(s[r][e] - from[e / 2]);
        sum[e / 2] += w[e];
      }
      weights[r][0] = pack<Element>(w[0], w[1]);
      weights[r][1] = pack<Element>(w[2], w[3]);
      if constexpr (Whole) {
        if (r % 2 == 0 && r + 1 < kRows) continue;
        accumulate_rows(values, weights, r / 2, r % 2 == 0);
      } else {
        accumulate_row(values, weights[r], r, columns);
      }
    }
    NATTEN_EXT_UNROLL
    for (int h = 0; h < 2; ++h) {
      sum[h] += shuffle_xor(sum[h], 1);
      sum[h] += shuffle_xor(sum[h], 2);
    }
  }

  // acc += weights * values, for a row of two blocks.
  NATTEN_EXT_DEVICE void accumulate_row(Values& values, const uint32_t (&weights)[2], int r, const Columns& columns) {
    if (r % Values::kProductsAtATime == 0) values.load(r);
    const uint32_t second = (columns.second[0] ? 0xffffu : 0) | (columns.second[1] ? 0xffff0000u : 0);
    const uint32_t left[4] = {weights[0] & ~second, weights[1] & ~second, weights[0] & second, weights[1] & second};
    NATTEN_EXT_UNROLL
    for (int n = 0; n < kChunks; ++n) multiply<Element>(acc[n], left, values.word(r, n, 0), values.word(r, n, 1));
  }
  // The same for two rows of one block, or for the last one.
  NATTEN_EXT_DEVICE void accumulate_rows(Values& values, const uint32_t (&weights)[kRows][2], int pair, bool single) {
    if (pair % Values::kProductsAtATime == 0) values.load(pair);
    const uint32_t(&upper)[2] = weights[2 * pair];
    NATTEN_EXT_UNROLL
    for (int n = 0; n < kChunks; ++n) {
      if (single) {
        multiply<Element>(acc[n], upper, values.word(pair, n, 0));
      } else {
        const uint32_t(&lower)[2] = weights[2 * pair + 1];
        const uint32_t left[4] = {upper[0], upper[1], lower[0], lower[1]};
        multiply<Element>(acc[n], left, values.word(pair, n, 0), values.word(pair, n, 1));
      }
    }
  }

  // All of it in ordinary arithmetic that leaves out what no query attends.
  NATTEN_EXT_DEVICE void attend_carefully(float factor, const Group& group, const Columns& columns) {
    const int rows = kNarrowKernel + (group.lower ? 1 : 0);
    float largest[2] = {-kInfinity<float>, -kInfinity<float>}, from[2] = {0, 0};
    clear(acc);
    sum[0] = sum[1] = 0;
    Keys keys(group.frame);
    NATTEN_EXT_NO_UNROLL
    for (int i = 0; i < 2 * rows; ++i) {
      const int r = i < rows ? i : i - rows;
      if (i == rows) find_base(largest, from);
      float s[4];
      keys.load(r);
      products(s, keys, 0, columns);
      NATTEN_EXT_UNROLL
      for (int e = 0; e < 4; ++e) {
        const int h = e / 2, first = h && group.lower ? 1 : 0;
        const bool exists = columns.valid[e % 2] && r >= first && r < first + kNarrowKernel;
        s[e] = exists ? fused_multiply_add(s[e], factor, load_shared<float>(columns.entry(e % 2, r, h))) : -kInfinity<float>;
        largest[h] = larger(largest[h], s[e]);
        if (i < rows) continue;
        s[e] = exists ? power_of_two(s[e] - from[h]) : kMasked<float>;
        sum[h] += s[e];
      }
      if (i >= rows) accumulate_valid_row(s, Tile::kValues, group.frame + r * Tile::kColumns, columns);
    }
    NATTEN_EXT_UNROLL
    for (int h = 0; h < 2; ++h) {
      sum[h] += shuffle_xor(sum[h], 1);
      sum[h] += shuffle_xor(sum[h], 2);
    }
  }

  NATTEN_EXT_DEVICE void accumulate_valid_row(const float (&weights)[4], Shared rows, int slot, const Columns& columns) {
    const uint32_t lane = narrow_lane();
    NATTEN_EXT_NO_UNROLL
    for (int column = 0; column < 8; ++column) {
      float weight[2];
      bool valid[2];
      NATTEN_EXT_UNROLL
      for (int h = 0; h < 2; ++h) {
        const float even = shuffle(weights[2 * h], lane / 4 * 4 + column / 2), odd = shuffle(weights[2 * h + 1], lane / 4 * 4 + column / 2);
        weight[h] = column % 2 ? odd : even;
        valid[h] = !is_negative_zero(weight[h]);
        weight[h] = as_operand<M>(weight[h]);
      }
      const Shared row = rows + Tile::place(slot + columns.frame_column(column), 0) + lane % 4 * 4;
      NATTEN_EXT_UNROLL
      for (int n = 0; n < kChunks; ++n) {
        struct alignas(4) Pair {
          Element e[2];
        };
        const Pair value = load_shared<Pair>(row ^ 16 * n);
        NATTEN_EXT_UNROLL
        for (int e = 0; e < 4; ++e) {
          if (valid[e / 2]) acc[n][e] = fused_multiply_add(weight[e / 2], widen(value.e[e % 2]), acc[n][e]);
        }
      }
    }
  }

  // Results leave in 16 bytes at a time, by way of the place where the group's queries were.
  NATTEN_EXT_DEVICE void write(const NarrowParams& p, const Tile& tile, const Group& group) const {
    const uint32_t lane = narrow_lane(), g = lane / 4, t = lane % 4;
    const float inverse[2] = {reciprocal(sum[0]), reciprocal(sum[1])};
    sync_warp();
    NATTEN_EXT_UNROLL
    for (int h = 0; h < 2; ++h) {
      const Shared row = Tile::kQueries + Tile::place(group.queries + g + 8 * h, 0) + 4 * t;
      NATTEN_EXT_UNROLL
      for (int n = 0; n < kChunks; ++n) {
        store_shared(row ^ 16 * n, pack<Element>(acc[n][2 * h] * inverse[h], acc[n][2 * h + 1] * inverse[h]));
      }
    }
    sync_warp();
    group.for_each_chunk(p, tile, p.output, [&](uint32_t row, uint64_t to, Shared from, bool exists) {
      if (exists && group.owns(row)) store_global(to, load_shared<Vector16>(from));
    });
    // Lanes t = 0, 1 write the base of query row t, lanes 2 and 3 the logarithm of its sum.
    const uint32_t h = t % 2;
    if (!group.owns(g + 8 * h)) return;
    const float log_sum = quick_logarithm(h ? sum[1] : sum[0]), row_base = h ? base[1] : base[0];
    const uint32_t position = tile.map_y(p, group.y + h) * p.width + tile.map_x(p, group.x + g, group.residue_x);
    const uint64_t row = multiply_add_wide(tile.batch * p.heads + tile.head, p.height * p.width, position);
    store_global(static_cast<float*>(t < 2 ? p.base : p.log_sum) + row, t < 2 ? row_base : log_sum);
    if (p.natural_lse != nullptr && t < 2) {
      store_global(static_cast<float*>(p.natural_lse) + row, (row_base + log_sum) / kLog2E<float>);
    }
  }
};

template <class M>
std::vector<HeadRange> narrow_forward(const Params& p, const std::vector<Window>& windows, Context& context) {
  return launch_narrow<M, NarrowForward>(p, windows, context, NarrowDims<M>{});
}

template std::vector<HeadRange> narrow_forward<NATTEN_EXT_MODE>(const Params&, const std::vector<Window>&, Context&);

}  // namespace natten_ext::cuda
