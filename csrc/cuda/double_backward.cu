// Double backward, in two kernels like the backward. The query-centred one goes over the keys twice: the first pass
// gives the row sums r and t, the second the gradients. Where the whole halo is one piece, the second pass finds it in
// shared memory. The formulas are in docs/double_backward.md, with two changes: t needs only dO.w = rowsum(P * G), and
// the gradient of grad_output is summed as (P (X - r)) V + P gV, so that nothing large cancels.
#include "launch.h"
#include "rows.h"

namespace natten_ext::cuda {

// The four products that both kernels make of a unit, and what becomes of them.
template <class Real>
struct PairTerms {
  Scores<Real> p, dp, x, g;  // P, dP, X, G; all zero where there is no pair

  NATTEN_EXT_DEVICE PairTerms() {
    clear(p);
    clear(dp);
    clear(x);
    clear(g);
  }
  template <bool ByKey>
  NATTEN_EXT_DEVICE void fold(const UnitPairs<ByKey>& pairs) {
    pairs.fold(p);
    pairs.fold(dp);
    pairs.fold(x);
    pairs.fold(g);
  }
  template <bool ByKey>
  NATTEN_EXT_DEVICE void unfold(const UnitPairs<ByKey>& pairs) {
    pairs.unfold(p);
    pairs.unfold(dp);
    pairs.unfold(x);
    pairs.unfold(g);
  }
  NATTEN_EXT_DEVICE void mask(int b, const BlockPairs& pairs) {
    NATTEN_EXT_UNROLL
    for (int e = 0; e < 4; ++e) {
      if (!pairs.valid(e / 2, e % 2)) p[b][e] = dp[b][e] = x[b][e] = g[b][e] = 0;
    }
  }
  // Sb = P (X (dP - D) - r dP + G - t) in x, dS = P (dP - D) in dp, and P (X - r) in g.
  NATTEN_EXT_DEVICE void to_gradients(int b, int e, Real delta, Real mean, Real rest) {
    const Real centred = dp[b][e] - delta, value = p[b][e] * (x[b][e] - mean);
    x[b][e] = p[b][e] * (x[b][e] * centred - mean * dp[b][e] + g[b][e] - rest);
    dp[b][e] = p[b][e] * centred;
    g[b][e] = value;
  }
};

template <class M, int D>
struct DoubleBackwardQuery {
  using Real = typename M::Real;
  static constexpr bool kByKey = false, kTableGradient = true;
  static constexpr int kOwn = 4, kStaged = 4, kScalars = 2, kTables = 2;
  static constexpr int kChannels = kResultChannels<M, D, 64>;
  static constexpr int kBlocks = M::kTensor && D <= 8 ? 3 : 2;  // on a multiprocessor, as far as registers go
  enum OwnTensor { kQuery, kGradOutput, kCotQuery, kOutput };
  enum StagedTensor { kKey, kValue, kCotKey, kCotValue };

  static void choose_tensors(Params& p) {
    p.own[0] = p.query;
    p.own[1] = p.grad_output;
    p.own[2] = p.cot_query;
    p.own[3] = p.output;
    p.staged[0] = p.key;
    p.staged[1] = p.value;
    p.staged[2] = p.cot_key;
    p.staged[3] = p.cot_value;
  }

  NATTEN_EXT_DEVICE static void run(const Params& p, const SharedLayout<M, D>& shared) {
    using Element = typename M::Element;
    const int head = block_x() % p.launch_heads, first = block_y() * kChannels;
    const TableReader<Element, Real> bias(p, p.bias, p.first_head + head, shared.table(0), kLog2E<Real>);
    const TableReader<Element, Real> cot_bias(p, p.cot_bias, p.first_head + head, shared.table(1), 1);
    const int warp = thread_index() / kWarp;
    TableGradient<Real> table(p, head, block_x() / p.launch_heads, shared.gradient(warp), shared.diagonal(warp));
    const Real scale = static_cast<Real>(p.scale), factor = scale * kLog2E<Real>;
    const bool has_cot_query = p.cot_query.data != nullptr, has_cot_key = p.cot_key.data != nullptr;
    const bool has_cot_value = p.cot_value.data != nullptr;

    for_each_tile<false>(p, [&](const Tile<false>& tile, auto again) {
      const OwnRows<false> own(p, tile);
      const Pieces pieces(tile.halo(p), p.plan.slots);
      stage_own<M, D, kOwn>(shared, p, tile);
      const LeftRows<M, D> query(shared.own(kQuery), own), grad_output(shared.own(kGradOutput), own);
      const LeftRows<M, D> cot_query(shared.own(kCotQuery), own);
      const RowNumbers<Real> base(p, p.base, tile, own), log_sum(p, p.log_sum, tile, own);

      const auto issue = [&](int i, int stage) {
        stage_piece<M, D, kStaged, 0>(shared, stage, p, again(), pieces.piece(i));
      };
      const auto write_key_terms = [&](int i, int stage) {
        if (!p.l2) return;
        const Rectangle piece = pieces.piece(i);
        write_key_norms<M, D>(shared.scalars(stage, 0), shared.rows(stage, kKey), piece, -factor / 2);
        if (has_cot_key) {
          write_key_products<M, D>(shared.scalars(stage, 1), shared.rows(stage, kCotKey), shared.rows(stage, kKey), piece,
                                   -scale);
        }
        sync_block();
      };
      // Calls `use(unit, pairs, terms)` for every unit of a staged piece; the terms are folded.
      const auto for_each_unit = [&](int i, int stage, auto use) {
        for (Walk walk(own.partners, pieces.piece(i), p.keys); walk.more();) {
          const Unit unit = walk.next();
          PairTerms<Real> terms;
          scores<M, D>(terms.p, query, shared.rows(stage, kKey), unit);
          scores<M, D>(terms.dp, grad_output, shared.rows(stage, kValue), unit);
          if (has_cot_query) scores<M, D>(terms.x, cot_query, shared.rows(stage, kKey), unit);
          if (has_cot_key) scores<M, D>(terms.x, query, shared.rows(stage, kCotKey), unit);
          if (has_cot_value) scores<M, D>(terms.g, grad_output, shared.rows(stage, kCotValue), unit);
          const UnitPairs<false> pairs(p, tile, own, unit);
          terms.fold(pairs);
          pairs.for_each_block([&](int b, const BlockPairs& block) {
            finish_scores(terms.p[b], block, factor, bias, [&](int, int c) {
              return p.l2 ? staged_scalar<Real>(shared.scalars(stage, 0), block, c) : Real(0);
            });
            NATTEN_EXT_UNROLL
            for (int e = 0; e < 4; ++e) {
              terms.p[b][e] = power_of_two(terms.p[b][e] - base[e / 2] - log_sum[e / 2]);
              Real add = 0;
              if (p.l2 && has_cot_key) add = staged_scalar<Real>(shared.scalars(stage, 1), block, e % 2);
              if (cot_bias && block.valid(e / 2, e % 2)) add += cot_bias.at(block.table_y[e / 2], block.table_x[e % 2]);
              terms.x[b][e] = fused_multiply_add(terms.x[b][e], scale, add);
            }
            terms.mask(b, block);
          });
          use(unit, pairs, terms);
        }
      };

      Real delta[2], mean[2] = {0, 0}, product[2] = {0, 0}, rest[2] = {0, 0};  // D, r, e, t
      for_each_piece(pieces.count, p.plan.stages, issue, [&](int i, int stage) {
        write_key_terms(i, stage);
        if (i == 0) own_row_products<M, D>(delta, shared.own(kGradOutput), shared.own(kOutput), own);
        for_each_unit(i, stage, [&](const Unit&, const UnitPairs<false>& pairs, PairTerms<Real>& terms) {
          pairs.for_each_block([&](int b, const BlockPairs&) {
            NATTEN_EXT_UNROLL
            for (int e = 0; e < 4; ++e) {
              const Real weighted = terms.p[b][e] * terms.x[b][e];
              mean[e / 2] += weighted;
              product[e / 2] += weighted * terms.dp[b][e];
              rest[e / 2] += terms.p[b][e] * terms.g[b][e];
            }
          });
        });
      });
      add_over_columns(mean);
      add_over_columns(product);
      add_over_columns(rest);
      for (int h = 0; h < 2; ++h) rest[h] += product[h] - 2 * delta[h] * mean[h];
      if (first == 0) {
        write_row_numbers(p, p.delta, tile, own, delta);
        write_row_numbers(p, p.row_mean, tile, own, mean);
        write_row_numbers(p, p.row_rest, tile, own, rest);
      }
      if (p.grad_query.data == nullptr && p.grad_grad_output.data == nullptr && !table) return;

      Real grad_query[kChannels / 8][4] = {}, grad_grad_output[kChannels / 8][4] = {};
      // A halo of one piece is there still, and so are its terms.
      const bool staged_again = pieces.count > 1;
      const auto issue_again = [&](int i, int stage) {
        if (staged_again) issue(i, stage);
      };
      for_each_piece(pieces.count, p.plan.stages, issue_again, [&](int i, int stage) {
        if (staged_again) write_key_terms(i, stage);
        for_each_unit(i, stage, [&](const Unit& unit, const UnitPairs<false>& pairs, PairTerms<Real>& terms) {
          pairs.for_each_block([&](int b, const BlockPairs&) {
            NATTEN_EXT_UNROLL
            for (int e = 0; e < 4; ++e) terms.to_gradients(b, e, delta[e / 2], mean[e / 2], rest[e / 2]);
          });
          terms.unfold(pairs);
          if (table) table.add(terms.x, own, unit, tile.x.kernel);
          const auto rows = [&](StagedTensor tensor) { return shared.rows(stage, tensor) + first * sizeof(Element); };
          accumulate<M, D, kChannels>(grad_query, terms.x, rows(kKey), unit);
          if (has_cot_key) accumulate<M, D, kChannels>(grad_query, terms.dp, rows(kCotKey), unit);
          accumulate<M, D, kChannels>(grad_grad_output, terms.g, rows(kValue), unit);
          if (has_cot_value) accumulate<M, D, kChannels>(grad_grad_output, terms.p, rows(kCotValue), unit);
        });
      });
      if (p.grad_query.data != nullptr) {
        write_rows<M, D, kChannels>(grad_query, {scale, scale}, p.grad_query, shared.own(kOutput), p, again(), own, first);
      }
      if (p.grad_grad_output.data != nullptr) {
        write_rows<M, D, kChannels>(grad_grad_output, {1, 1}, p.grad_grad_output, shared.own(kOutput), p, again(), own, first);
      }
    });
    table.write_partial(p, shared.gradient(0), shared.table_bytes);
  }
};

template <class M, int D>
struct DoubleBackwardKey {
  using Real = typename M::Real;
  static constexpr bool kByKey = true, kTableGradient = false;
  static constexpr int kOwn = 4, kStaged = 3, kScalars = 5, kTables = 2;
  static constexpr int kChannels = kResultChannels<M, D, 96>;
  static constexpr int kBlocks = M::kTensor && D <= 8 ? 3 : 2;  // on a multiprocessor, as far as registers go
  enum OwnTensor { kKey, kValue, kCotKey, kCotValue };
  enum StagedTensor { kQuery, kGradOutput, kCotQuery };
  enum Scalar { kBase, kLogSum, kDelta, kMean, kRest };

  static void choose_tensors(Params& p) {
    p.own[0] = p.key;
    p.own[1] = p.value;
    p.own[2] = p.cot_key;
    p.own[3] = p.cot_value;
    p.staged[0] = p.query;
    p.staged[1] = p.grad_output;
    p.staged[2] = p.cot_query;
    p.scalars[kBase] = p.base;
    p.scalars[kLogSum] = p.log_sum;
    p.scalars[kDelta] = p.delta;
    p.scalars[kMean] = p.row_mean;
    p.scalars[kRest] = p.row_rest;
  }

  NATTEN_EXT_DEVICE static void run(const Params& p, const SharedLayout<M, D>& shared) {
    using Element = typename M::Element;
    const int head = block_x() % p.launch_heads, first = block_y() * kChannels;
    const TableReader<Element, Real> bias(p, p.bias, p.first_head + head, shared.table(0), kLog2E<Real>);
    const TableReader<Element, Real> cot_bias(p, p.cot_bias, p.first_head + head, shared.table(1), 1);
    const Real scale = static_cast<Real>(p.scale), factor = scale * kLog2E<Real>;
    const bool has_cot_query = p.cot_query.data != nullptr, has_cot_key = p.cot_key.data != nullptr;
    const bool has_cot_value = p.cot_value.data != nullptr;

    for_each_tile<true>(p, [&](const Tile<true>& tile, auto again) {
      const OwnRows<true> own(p, tile);
      const Pieces pieces(tile.halo(p), p.plan.slots);
      stage_own<M, D, kOwn>(shared, p, tile);
      const LeftRows<M, D> key(shared.own(kKey), own), value(shared.own(kValue), own);
      const LeftRows<M, D> cot_key(shared.own(kCotKey), own), cot_value(shared.own(kCotValue), own);
      Real key_bias[2] = {0, 0}, key_term[2] = {0, 0};    // of l2, in S and in X
      Real sum[2] = {0, 0}, first_sum[2] = {0, 0};        // of Sb and dS over the key's queries
      Real grad_key[kChannels / 8][4] = {}, grad_value[kChannels / 8][4] = {};

      const auto issue = [&](int i, int stage) {
        stage_piece<M, D, kStaged, kScalars>(shared, stage, p, again(), pieces.piece(i));
      };
      for_each_piece(pieces.count, p.plan.stages, issue, [&](int i, int stage) {
        if (i == 0 && p.l2) {
          own_row_products<M, D>(key_bias, shared.own(kKey), shared.own(kKey), own);
          if (has_cot_key) own_row_products<M, D>(key_term, shared.own(kCotKey), shared.own(kKey), own);
          for (int h = 0; h < 2; ++h) key_bias[h] *= -factor / 2, key_term[h] *= -scale;
        }
        for (Walk walk(own.partners, pieces.piece(i), p.queries); walk.more();) {
          const Unit unit = walk.next();
          PairTerms<Real> terms;
          scores<M, D>(terms.p, key, shared.rows(stage, kQuery), unit);
          scores<M, D>(terms.dp, value, shared.rows(stage, kGradOutput), unit);
          if (has_cot_query) scores<M, D>(terms.x, key, shared.rows(stage, kCotQuery), unit);
          if (has_cot_key) scores<M, D>(terms.x, cot_key, shared.rows(stage, kQuery), unit);
          if (has_cot_value) scores<M, D>(terms.g, cot_value, shared.rows(stage, kGradOutput), unit);
          const UnitPairs<true> pairs(p, tile, own, unit);
          terms.fold(pairs);
          pairs.for_each_block([&](int b, const BlockPairs& block) {
            finish_scores(terms.p[b], block, factor, bias, [&](int h, int) { return key_bias[h]; });
            const auto number = [&](Scalar which, int e) {
              return staged_scalar<Real>(shared.scalars(stage, which), block, e % 2);
            };
            NATTEN_EXT_UNROLL
            for (int e = 0; e < 4; ++e) {
              terms.p[b][e] = power_of_two(terms.p[b][e] - number(kBase, e) - number(kLogSum, e));
              Real add = key_term[e / 2];
              if (cot_bias && block.valid(e / 2, e % 2)) add += cot_bias.at(block.table_y[e / 2], block.table_x[e % 2]);
              terms.x[b][e] = fused_multiply_add(terms.x[b][e], scale, add);
            }
            terms.mask(b, block);
            NATTEN_EXT_UNROLL
            for (int e = 0; e < 4; ++e) {
              terms.to_gradients(b, e, number(kDelta, e), number(kMean, e), number(kRest, e));
              sum[e / 2] += terms.x[b][e];
              first_sum[e / 2] += terms.dp[b][e];
            }
          });
          terms.unfold(pairs);
          const uint32_t channel = first * sizeof(Element);
          accumulate<M, D, kChannels>(grad_value, terms.g, shared.rows(stage, kGradOutput) + channel, unit);
          accumulate<M, D, kChannels>(grad_key, terms.x, shared.rows(stage, kQuery) + channel, unit);
          if (has_cot_query) accumulate<M, D, kChannels>(grad_key, terms.dp, shared.rows(stage, kCotQuery) + channel, unit);
        }
      });

      if (p.l2) {
        add_over_columns(sum);
        add_over_columns(first_sum);
        subtract_rows<M, D, kChannels>(grad_key, sum, shared.own(kKey), own, first);
        if (has_cot_key) subtract_rows<M, D, kChannels>(grad_key, first_sum, shared.own(kCotKey), own, first);
      }
      if (p.grad_key.data != nullptr) {
        write_rows<M, D, kChannels>(grad_key, {scale, scale}, p.grad_key, shared.own(kValue), p, again(), own, first);
      }
      if (p.grad_value.data != nullptr) {
        write_rows<M, D, kChannels>(grad_value, {1, 1}, p.grad_value, shared.own(kValue), p, again(), own, first);
      }
    });
  }
};

template <class M>
void double_backward_query(const Params& p, const std::vector<Window>& windows, Context& context) {
  launch_all_heads<M, DoubleBackwardQuery>(p, windows, context, HeadDims<M>{});
}
template <class M>
void double_backward_key(const Params& p, const std::vector<Window>& windows, Context& context) {
  launch_all_heads<M, DoubleBackwardKey>(p, windows, context, HeadDims<M>{});
}

template void double_backward_query<NATTEN_EXT_MODE>(const Params&, const std::vector<Window>&, Context&);
template void double_backward_key<NATTEN_EXT_MODE>(const Params&, const std::vector<Window>&, Context&);

}  // namespace natten_ext::cuda
