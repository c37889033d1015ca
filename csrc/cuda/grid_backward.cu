// Backward of grids of 16 x 16 windows (grid.h), both sides in one kernel: scores, weights P and their gradients dS are computed once.
//
// A block has a window and 16 warps, and takes a quarter of the queries at a time, in three steps with a barrier between:
//   1. four warps have a group of queries, each with a quarter of the keys: they leave P and dS in shared memory, rounded, and
//      what rounding left of dS;
//   2. the first of the four adds their gradients of queries, and finds out what D lacks;
//   3. each of the first eight warps has two rows of keys, whose gradients it sums from P and dS. The other eight sum the
//      table's gradient from dS: each has the pairs of rows of queries and keys that lie so far apart.
// backward.cu says what corrects D.
#include "grid_launch.h"

namespace natten_ext::cuda {

template <class M, int Dim>
struct GridBackward {
  using Element = typename M::Element;
  using Tile = GridTile<Dim, kGridWindow>;
  using Group = GridGroup<Tile>;
  using Entries = GridEntries<Tile>;
  using Left = NarrowLeft<M, Tile>;
  using Sums = FrameSums<M, Tile, true>;
  using Fragment = float[Tile::kChunks][4];
  static constexpr int kChunks = Tile::kChunks;
  static constexpr int kBlocksAtATime = 1;  // on a multiprocessor
  // Rows of keys that may be loaded ahead, and those in a loop's code, as far as registers go.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  static constexpr int kTogether = 1, kUnroll = Dim == 8 ? 4 : 1;
#else
  static constexpr int kTogether = 2, kUnroll = 4;
#endif
  static constexpr bool kTableGradient = true;
  static constexpr int kRowNumbers = 0;
  static constexpr int kParts = 4, kRows = kGridWindow / kParts;  // of a window, of queries as of keys; rows of a part
  static constexpr int kGroups = kRows * kGridWindow / kWarpRows;  // of a part

  // Regions of a window's rows, those of `Tile` first. Once D is known, queries times what D lacks come to the places of outputs.
  static constexpr Shared kQueries = Tile::kQueries, kGradOutputs = kQueries + Tile::kRegion, kOutputs = kGradOutputs + Tile::kRegion;
  static constexpr Shared kCorrections = kOutputs;
  // P and dS of a part of the queries, and what rounding left of dS: rows of 256 keys, whose chunks change places so that those of
  // eight rows lie in different banks.
  static constexpr Shared kPairRow = Tile::kSlots * sizeof(Element), kPairs = kRows * kGridWindow * kPairRow;
  static constexpr Shared kWeights = (kOutputs + Tile::kRegion + kPairRow - 1) / kPairRow * kPairRow;
  static constexpr Shared kGradients = kWeights + kPairs, kRests = kGradients + kPairs;
  // A warp's gradient of queries on its way to the first of the group, and the sums of rows of dS.
  static constexpr Shared kExchange = kRests + kPairs, kExchangeBytes = (kChunks + 1) * kWarp * 16;
  static constexpr Shared kTable = kExchange + (kParts - 1) * kGroups * kExchangeBytes;
  static constexpr Shared kNumbers = kTable + Tile::kTableBytes;  // of queries: the two parts of the log-sum-exp, and its gradient
  static constexpr uint32_t kShared = kNumbers + 3 * Tile::kSlots * sizeof(float);

  // Sums that a warp keeps: one of the first eight has gradients of values and keys of two rows, one of the others those of two
  // rows of the table, down and up.
  float sums[8][4];
  Fragment grad_query;
  float query_sums[2];  // of dS, of a lane's two queries

  NATTEN_EXT_DEVICE static uint32_t warp() { return narrow_thread() / kWarp; }
  // Which part of the keys a warp has in the first step.
  NATTEN_EXT_DEVICE static int key_part() { return static_cast<int>(warp() / kGroups); }
  // The place among eight warps, and which eight, in the last.
  NATTEN_EXT_DEVICE static uint32_t place() { return warp() % 8; }
  NATTEN_EXT_DEVICE static bool is_second() { return warp() >= 8; }
  // A group of a part of the queries.
  NATTEN_EXT_DEVICE static Group group_of(uint32_t i, int part) { return Group::template of_warp<kGroups>(i, part); }
  template <int Which>
  NATTEN_EXT_DEVICE Fragment& of_key_row(int i) { return reinterpret_cast<Fragment&>(sums[(2 * i + Which) * kChunks]); }

  NATTEN_EXT_DEVICE static void run(const NarrowParams& p) {
    const int head = p.head[narrow_launch_head(p)];
    fill_grid_table<Element, Tile>(p, head, kTable);
    GridBackward gradients;
    clear(gradients.sums);
    for (int index = narrow_block_of_head(p); index < p.tiles; index += p.blocks_per_head) {
      const GridWindow window(p, head, index);
      stage_grid_window<Tile>(p, window, {&p.query, &p.key, &p.value, &p.grad_output, &p.output},
                              {kQueries, Tile::kKeys, Tile::kValues, kGradOutputs, kOutputs});
      stage_numbers(p, window);
      copy_async_commit();
      copy_async_wait<0>();
      sync_block();
      if (!is_second()) clear(gradients.sums);
      NATTEN_EXT_NO_UNROLL
      for (int part = 0; part < kParts; ++part) gradients.attend_part(p, window, part);
      if (!is_second()) gradients.write_keys(p, window);
      sync_block();  // shared memory is free again
    }
    if (p.table_partials != nullptr && is_second()) gradients.write_table(p);
  }

  // Each thread copies a number or two.
  NATTEN_EXT_DEVICE static void stage_numbers(const NarrowParams& p, const GridWindow& window) {
    const uint32_t slot = narrow_thread() % Tile::kSlots, which = narrow_thread() / Tile::kSlots;
    const uint64_t row = window.row_index(p, slot / kGridWindow, slot % kGridWindow);
    const auto number = [&](uint32_t i) { return kNumbers + (i * Tile::kSlots + slot) * static_cast<Shared>(sizeof(float)); };
    copy_async<4>(number(which), static_cast<const float*>(which == 0 ? p.base : p.log_sum) + row, true);
    if (which == 0) copy_async<4>(number(2), static_cast<const float*>(p.grad_lse) + row, p.grad_lse != nullptr);
  }

  // The steps for a part of the queries.
  NATTEN_EXT_DEVICE void attend_part(const NarrowParams& p, const GridWindow& window, int part) {
    const Group group = group_of(warp() % kGroups, part);
    attend(p, group);
    if (key_part() > 0) send();
    sync_block();
    if (key_part() == 0) {
      receive();
      finish_queries(p, window, group);
    }
    sync_block();
    if (!is_second()) attend_keys(part);
    else if (p.table_partials != nullptr) add_to_table(part);
    sync_block();
  }

  // ------------------------------------------------------------------------------------------ queries

  NATTEN_EXT_DEVICE void attend(const NarrowParams& p, const Group& group) {
    Left query, grad_output;
    query.load_from(kQueries + group.left_place());
    grad_output.load_from(kGradOutputs + group.left_place());
    float d[2], base[2], log_sum[2], from[2];
    load_d(d, group, grad_output);
    bool plain = true;
    NATTEN_EXT_UNROLL
    for (uint32_t h = 0; h < 2; ++h) {
      const uint32_t slot = (group.y + h) * kGridWindow + group.x + narrow_lane() / 4;
      const auto number = [&](uint32_t i) { return load_shared<float>(kNumbers + (i * Tile::kSlots + slot) * static_cast<Shared>(sizeof(float))); };
      base[h] = number(0), log_sum[h] = number(1);
      d[h] -= number(2);
      const float lse = base[h] + log_sum[h];
      from[h] = -lse / p.factor;
      plain = plain && lse * lse <= kPlain * kPlain && from[h] * 0 == 0;
    }
    if (any_in_warp(!plain)) attend_keys_of<true>(p, group, query, grad_output, d, base, log_sum);
    else attend_keys_of<false>(p, group, query, grad_output, d, from, from);
  }

  // D: products of rows of grad_output and output, formed as dP is: the diagonals of two blocks.
  NATTEN_EXT_DEVICE static void load_d(float (&d)[2], const Group& group, const Left& grad_output) {
    const uint32_t lane = narrow_lane(), g = lane / 4;
    float c[2][4];
    clear(c);
    NATTEN_EXT_UNROLL
    for (int b = 0; b < 2; ++b) {
      uint32_t words[4];
      load_matrices(words, kOutputs + group.place(8 * b + lane % 8, lane / 8 % kChunks));
      grad_output.multiply_rows(c[b], [&](int chunk) { return words[chunk]; });
    }
    NATTEN_EXT_UNROLL
    for (int h = 0; h < 2; ++h) d[h] = shuffle(g % 2 ? c[h][2 * h + 1] : c[h][2 * h], 4 * g + g / 2);
  }

  // Log-sum-exps up to this (in base 2) may be taken off products before these are scaled: the error is that of a float of this size.
  static constexpr float kPlain = 256;

  // A group and a part of the keys. Products start at what is taken off them. `Exact`: scores are formed as in the forward, and the
  // two parts of their log-sum-exp, `a` and `b`, taken off one by one; otherwise products start at `a`.
  template <bool Exact>
  NATTEN_EXT_DEVICE void attend_keys_of(const NarrowParams& p, const Group& group, const Left& query, const Left& grad_output,
                                        const float (&d)[2], const float (&a)[2], const float (&b)[2]) {
    const int first = key_part() * kRows;
    const uint32_t lane = narrow_lane();
    float of_scores[4], of_products[4];
    NATTEN_EXT_UNROLL
    for (int e = 0; e < 4; ++e) of_scores[e] = forget(Exact ? 0 : a[e / 2]), of_products[e] = forget(-d[e / 2]);
    const Shared skipped = first * Tile::kRowBytes;
    FrameScores<Tile> keys(Tile::kKeys + skipped, 0), values(Tile::kValues + skipped, 0);
    FrameResults<Tile> key_rows(Tile::kKeys + skipped, 0);
    Entries entries(group, kTable + first * Tile::kTableRow);
    typename Entries::Pair upper[2], lower[2];
    entries.load(lower, -1);
    // The lane's row of the group and half of a row of keys, as store_matrices asks for them.
    const Shared pairs = pair_chunk(kWeights, pair_row(group, lane % 16), 2 * first + lane / 16);
    Sums results;
    results.clear_all();
    NATTEN_EXT_UNROLL_BY(kUnroll)
    for (int r = 0; r < kRows; ++r) {
      if (r % keys.kRowsAtATime == 0) {
        keys.load(r);
        values.load(r);
      }
      entries.load(upper, r);
      float s[2][4], ds[2][4];
      NATTEN_EXT_UNROLL
      for (int block = 0; block < 2; ++block) {
        query.multiply_rows_from(s[block], of_scores, [&](int chunk) { return keys.word(r % keys.kRowsAtATime, block, chunk); });
        grad_output.multiply_rows_from(ds[block], of_products, [&](int chunk) { return values.word(r % keys.kRowsAtATime, block, chunk); });
      }
      NATTEN_EXT_UNROLL
      for (int e = 0; e < 8; ++e) {
        const int block = e / 4, h = e / 2 % 2;
        float& weight = s[block][e % 4];
        const float score = fused_multiply_add(weight, p.factor, h ? lower[block].e[e % 2] : upper[block].e[e % 2]);
        weight = Exact ? weight_of(score, a[h], b[h]) : power_of_two(score);
        ds[block][e % 4] *= weight;
      }
      NATTEN_EXT_UNROLL
      for (int i = 0; i < 2; ++i) lower[i] = upper[i];
      uint32_t packed[4];
      pack_weights<Element>(packed, s);
      store_matrices(pairs ^ r * 32, packed);
      pack_weights<Element>(packed, ds);
      store_matrices((pairs ^ r * 32) + (kGradients - kWeights), packed);
      if (p.table_partials != nullptr) {
        uint32_t rest[4];
        NATTEN_EXT_UNROLL
        for (int e = 0; e < 8; ++e) ds[e / 4][e % 4] -= widen(Element{static_cast<uint16_t>(packed[e / 2] >> (16 * (e % 2)))});
        pack_weights<Element>(rest, ds);
        store_matrices((pairs ^ r * 32) + (kRests - kWeights), rest);
      }
      if (r % key_rows.kProductsAtATime == 0) key_rows.load(r);
      results.add_packed(key_rows, r, packed);
      if (r % kTogether == kTogether - 1 && never(s[0][0])) return;
    }
    NATTEN_EXT_UNROLL
    for (int i = 0; i < 4 * kChunks; ++i) grad_query[i / 4][i % 4] = results.acc[i / 4][i % 4];
    query_sums[0] = results.totals[0], query_sums[1] = results.totals[2];
  }

  // The other warps of a group send what they have to the first.
  struct alignas(16) Four {
    float e[4];
  };
  NATTEN_EXT_DEVICE static Shared exchange(int key_part, int i) {
    return kExchange + ((key_part - 1) * kGroups + warp() % kGroups) * kExchangeBytes + (i * kWarp + narrow_lane()) * 16;
  }
  NATTEN_EXT_DEVICE void send() const {
    NATTEN_EXT_UNROLL
    for (int n = 0; n < kChunks; ++n) {
      store_shared(exchange(key_part(), n), Four{{grad_query[n][0], grad_query[n][1], grad_query[n][2], grad_query[n][3]}});
    }
    store_shared(exchange(key_part(), kChunks), Four{{query_sums[0], query_sums[1], 0, 0}});
  }
  NATTEN_EXT_DEVICE void receive() {
    NATTEN_EXT_UNROLL
    for (int part = 1; part < kParts; ++part) {
      NATTEN_EXT_UNROLL
      for (int n = 0; n < kChunks; ++n) {
        const Four sent = load_shared<Four>(exchange(part, n));
        NATTEN_EXT_UNROLL
        for (int e = 0; e < 4; ++e) grad_query[n][e] += sent.e[e];
      }
      const Four sent = load_shared<Four>(exchange(part, kChunks));
      query_sums[0] += sent.e[0], query_sums[1] += sent.e[1];
    }
  }

  // Rows of dS sum to y. What is left over is what D lacks, and roundings: see subtract_rows in rows.h. What gradients of keys lack is
  // P times the queries times it.
  NATTEN_EXT_DEVICE void finish_queries(const NarrowParams& p, const GridWindow& window, const Group& group) {
    struct alignas(4) Pair {
      Element e[2];
    };
    const uint32_t g = narrow_lane() / 4, t = narrow_lane() % 4;
    float lacking[2];
    NATTEN_EXT_UNROLL
    for (uint32_t h = 0; h < 2; ++h) {
      const uint32_t slot = (group.y + h) * kGridWindow + group.x + g;
      lacking[h] = query_sums[h] - load_shared<float>(kNumbers + (2 * Tile::kSlots + slot) * static_cast<Shared>(sizeof(float)));
      NATTEN_EXT_UNROLL
      for (int n = 0; n < kChunks; ++n) {
        const Pair key = load_shared<Pair>(Tile::kKeys + group.place(g + 8 * h, n) + 4 * t);
        NATTEN_EXT_UNROLL
        for (int e = 0; e < 2; ++e) grad_query[n][2 * h + e] = fused_multiply_add(-lacking[h], widen(key.e[e]), grad_query[n][2 * h + e]);
      }
    }
    if (p.grad_query.data != nullptr) group.template write<Element>(grad_query, {p.scale, p.scale}, p, window, p.grad_query, kOutputs);
    sync_warp();
    NATTEN_EXT_UNROLL
    for (uint32_t h = 0; h < 2; ++h) {
      NATTEN_EXT_UNROLL
      for (int n = 0; n < kChunks; ++n) {
        const Shared place = group.place(g + 8 * h, n) + 4 * t;
        const Pair query = load_shared<Pair>(kQueries + place);
        store_shared(kCorrections + place, pack<Element>(-lacking[h] * widen(query.e[0]), -lacking[h] * widen(query.e[1])));
      }
    }
  }

  // ------------------------------------------------------------------------------------------ the table

  // Adds pairs of rows of queries with keys `apart` rows below, or kGridWindow - apart above where the window ends before: a row of
  // pairs is a left operand, added by a product with ones on a diagonal. Zero times NaN is NaN: but where one of a query's dS is not
  // finite, none is, or they overflow, and their entries are its own.
  NATTEN_EXT_DEVICE void add_to_table(int part) {
    const uint32_t lane = narrow_lane(), g = lane / 4, t = lane % 4;
    const uint32_t one = pack<Element>(g == 2 * t ? 1.0f : 0.0f, g == 2 * t + 1 ? 1.0f : 0.0f);
    NATTEN_EXT_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int apart = part * kRows + 2 * static_cast<int>(place()) + i, below = greater(lesser(kGridWindow - apart, kRows), 0);
      const auto add = [&](float (&left)[4], float (&right)[4], int begin, int end) {
        // From one pair of rows to the next, a row of the map and 32 bytes further; rows of pairs are multiples of these.
        constexpr Shared kStep = kGridWindow * kPairRow + 32;
        Shared pairs = kGradients + (begin * kGridWindow + lane % 16) * kPairRow + (apart + begin) % kGridWindow * 32;
        NATTEN_EXT_NO_UNROLL
        for (int y = begin; y < end; ++y, pairs += kStep) {
          NATTEN_EXT_UNROLL
          for (int rest = 0; rest < 2; ++rest) {
            uint32_t row[4];
            load_matrices(row, (pairs ^ (lane / 16 ^ lane % 8) * 16) + rest * (kRests - kGradients));
            multiply<Element>(left, row, one, 0);
            multiply<Element>(right, row, 0, one);
          }
        }
      };
      add(sums[4 * i], sums[4 * i + 1], 0, below);
      add(sums[4 * i + 2], sums[4 * i + 3], below, kRows);
    }
  }
  // Rows of P and dS are those of a part of the window. Which is a group's row?
  NATTEN_EXT_DEVICE static uint32_t pair_row(const Group& group, uint32_t row) {
    return (group.y % kRows + row / 8) * kGridWindow + group.x + row % 8;
  }
  // Where a chunk of such a row lies.
  NATTEN_EXT_DEVICE static Shared pair_chunk(Shared region, uint32_t row, uint32_t chunk) { return region + row * kPairRow + (chunk ^ row % 8) * 16; }

  // At the end of the block: offsets of pairs are equal on diagonals.
  NATTEN_EXT_DEVICE void write_table(const NarrowParams& p) const {
    constexpr Shared kRow = kGridWindow * sizeof(float);
    const uint32_t lane = narrow_lane();
    const Shared scratch = kWeights + place() * kGridWindow * kRow;
    auto* to = static_cast<float*>(p.table_partials) + (int64_t{narrow_block_of_head(p)} * p.launch_heads + narrow_launch_head(p)) *
                                                           Tile::kTableExtent * Tile::kTableExtent;
    NATTEN_EXT_UNROLL
    for (int part = 0; part < 4; ++part) {
      const int up = part % 2, apart = static_cast<int>(2 * place()) + part / 2;
      sync_warp();
      NATTEN_EXT_UNROLL
      for (int e = 0; e < 8; ++e) {
        const int y = lane / 4 + e / 2 % 2 * 8, x = lane % 4 * 2 + e % 2 + e / 4 * 8;
        store_shared(scratch + y * kRow + x * static_cast<Shared>(sizeof(float)), sums[2 * part + e / 4][e % 4]);
      }
      sync_warp();
      const int right = static_cast<int>(lane) - kGridWindow + 1, row = apart - up * kGridWindow + kGridWindow - 1;
      float sum = 0;
      for (int y = 0; y < kGridWindow; ++y) {
        if (inside(y + right, kGridWindow)) sum += load_shared<float>(scratch + y * kRow + (y + right) * static_cast<Shared>(sizeof(float)));
      }
      if (row >= 0 && lane < Tile::kTableExtent) store_global(to + row * Tile::kTableExtent + lane, sum);
    }
  }

  // ------------------------------------------------------------------------------------------ keys

  NATTEN_EXT_DEVICE void attend_keys(int part) {
    const uint32_t lane = narrow_lane(), matrix = lane / 8;
    NATTEN_EXT_NO_UNROLL
    for (uint32_t i = 0; i < kGroups; ++i) {
      const Group group = group_of(i, part);
      const Rows grad_outputs(kGradOutputs, group), queries(kQueries, group), corrections(kCorrections, group);
      NATTEN_EXT_UNROLL
      for (int k = 0; k < 2; ++k) {
        uint32_t weights[4], gradients[4];
        const Shared pairs = pair_chunk(kWeights, pair_row(group, lane % 8 + matrix / 2 * 8), 2 * (2 * place() + k) + matrix % 2);
        load_matrices_transposed(weights, pairs);
        load_matrices_transposed(gradients, pairs + (kGradients - kWeights));
        grad_outputs.add_to(of_key_row<0>(k), weights);
        queries.add_to(of_key_row<1>(k), gradients);
        corrections.add_to(of_key_row<1>(k), weights);
      }
    }
  }
  // A group's rows in a region, as right operands.
  struct Rows {
    uint32_t words[kChunks * 2];
    NATTEN_EXT_DEVICE Rows(Shared region, const Group& group) {
      const uint32_t lane = narrow_lane();
      load_matrices_transposed(words, region + group.place(lane % 16, lane / 16 % kChunks));
    }
    NATTEN_EXT_DEVICE void add_to(Fragment& acc, const uint32_t (&weights)[4]) const {
      NATTEN_EXT_UNROLL
      for (int n = 0; n < kChunks; ++n) multiply<Element>(acc[n], weights, words[2 * n], words[2 * n + 1]);
    }
  };

  NATTEN_EXT_DEVICE void write_keys(const NarrowParams& p, const GridWindow& window) {
    NATTEN_EXT_UNROLL
    for (int k = 0; k < 2; ++k) {
      const GridGroup<Tile, true> keys(static_cast<int>(2 * place()) + k, 0);
      if (p.grad_value.data != nullptr) keys.template write<Element>(of_key_row<0>(k), {1, 1}, p, window, p.grad_value, Tile::kValues);
      if (p.grad_key.data != nullptr) keys.template write<Element>(of_key_row<1>(k), {p.scale, p.scale}, p, window, p.grad_key, Tile::kKeys);
    }
  }
};

template <class M>
bool grid_backward(const Params& p, const std::vector<Window>& windows, Context& context) {
  return launch_grid<M, GridBackward>(p, windows, context, GridBackwardDims<M>{});
}
template <class M>
bool grid_backward_takes(const Params& p, const std::vector<Window>& windows, const Context& context) {
  return grid_takes<M, GridBackward>(p, windows, context, GridBackwardDims<M>{});
}

template bool grid_backward<NATTEN_EXT_MODE>(const Params&, const std::vector<Window>&, Context&);
template bool grid_backward_takes<NATTEN_EXT_MODE>(const Params&, const std::vector<Window>&, const Context&);

}  // namespace natten_ext::cuda
