// Backward, in two kernels that gather what they write: the query-centred one has the gradients of queries and of the
// table, and leaves D = rowsum(dO * O) for the key-centred one, which has those of keys and values.
// The formulas are in docs/double_backward.md.
#include "launch.h"
#include "rows.h"

namespace natten_ext::cuda {

template <class M, int D>
struct BackwardQuery {
  using Real = typename M::Real;
  static constexpr bool kByKey = false, kTableGradient = true;
  static constexpr int kOwn = 3, kStaged = 2, kScalars = 1, kTables = 1;  // query, grad_output, output; key, value
  static constexpr int kChannels = kResultChannels<M, D, 128>;
  static constexpr int kBlocks = D * sizeof(typename M::Element) <= 64 ? 3 : 2;  // on a multiprocessor, as far as registers go

  static void choose_tensors(Params& p) {
    p.own[0] = p.query;
    p.own[1] = p.grad_output;
    p.own[2] = p.output;
    p.staged[0] = p.key;
    p.staged[1] = p.value;
  }

  NATTEN_EXT_DEVICE static void run(const Params& p, const SharedLayout<M, D>& shared) {
    const int head = block_x() % p.launch_heads, first = block_y() * kChannels;
    const TableReader<typename M::Element, Real> bias(p, p.bias, p.first_head + head, shared.table(0), kLog2E<Real>);
    const int warp = thread_index() / kWarp;
    TableGradient<Real> table(p, head, block_x() / p.launch_heads, shared.gradient(warp), shared.diagonal(warp));
    const Real factor = static_cast<Real>(p.scale) * kLog2E<Real>;

    for_each_tile<false>(p, [&](const Tile<false>& tile, auto again) {
      const OwnRows<false> own(p, tile);
      const Pieces pieces(tile.halo(p), p.plan.slots);
      stage_own<M, D, kOwn>(shared, p, tile);
      const LeftRows<M, D> query(shared.own(0), own), grad_output(shared.own(1), own);
      const RowNumbers<Real> base(p, p.base, tile, own), log_sum(p, p.log_sum, tile, own);
      Real delta[2];
      Real acc[kChannels / 8][4] = {};

      const auto issue = [&](int i, int stage) {
        stage_piece<M, D, kStaged, 0>(shared, stage, p, again(), pieces.piece(i));
      };
      const bool pairs_needed = p.grad_query.data != nullptr || table;
      for_each_piece(pairs_needed ? pieces.count : 1, p.plan.stages, issue, [&](int i, int stage) {
        const Rectangle piece = pieces.piece(i);
        const Shared key_bias = shared.scalars(stage, 0);
        if (p.l2) {
          write_key_norms<M, D>(key_bias, shared.rows(stage, 0), piece, -factor / 2);
          sync_block();
        }
        if (i == 0) own_row_products<M, D>(delta, shared.own(1), shared.own(2), own);
        if (!pairs_needed) return;
        for (Walk walk(own.partners, piece, p.keys); walk.more();) {
          const Unit unit = walk.next();
          Scores<Real> s, dp;
          clear(s);
          clear(dp);
          scores<M, D>(s, query, shared.rows(stage, 0), unit);
          scores<M, D>(dp, grad_output, shared.rows(stage, 1), unit);
          const UnitPairs<false> pairs(p, tile, own, unit);
          pairs.fold(s);
          pairs.fold(dp);
          pairs.for_each_block([&](int b, const BlockPairs& block) {
            finish_scores(s[b], block, factor, bias,
                          [&](int, int c) { return p.l2 ? staged_scalar<Real>(key_bias, block, c) : Real(0); });
            NATTEN_EXT_UNROLL
            for (int e = 0; e < 4; ++e) {
              const Real weight = power_of_two(s[b][e] - base[e / 2] - log_sum[e / 2]);
              s[b][e] = block.valid(e / 2, e % 2) ? weight * (dp[b][e] - delta[e / 2]) : Real(0);
            }
          });
          pairs.unfold(s);
          if (table) table.add(s, own, unit, tile.x.kernel);
          accumulate<M, D, kChannels>(acc, s, shared.rows(stage, 0) + first * sizeof(typename M::Element), unit);
        }
      });

      if (p.grad_query.data != nullptr) {
        const Real scale = static_cast<Real>(p.scale);
        write_rows<M, D, kChannels>(acc, {scale, scale}, p.grad_query, shared.own(2), p, again(), own, first);
      }
      if (first == 0) write_row_numbers(p, p.delta, tile, own, delta);
    });
    table.write_partial(p, shared.gradient(0), shared.table_bytes);
  }
};

template <class M, int D>
struct BackwardKey {
  using Real = typename M::Real;
  static constexpr bool kByKey = true, kTableGradient = false;
  static constexpr int kOwn = 2, kStaged = 2, kScalars = 3, kTables = 1;  // key, value; query, grad_output; L, D
  static constexpr int kChannels = kResultChannels<M, D, 96>;
  static constexpr int kBlocks = D * sizeof(typename M::Element) <= 64 ? 3 : 2;  // on a multiprocessor, as far as registers go

  static void choose_tensors(Params& p) {
    p.own[0] = p.key;
    p.own[1] = p.value;
    p.staged[0] = p.query;
    p.staged[1] = p.grad_output;
    p.scalars[0] = p.base;
    p.scalars[1] = p.log_sum;
    p.scalars[2] = p.delta;
  }

  NATTEN_EXT_DEVICE static void run(const Params& p, const SharedLayout<M, D>& shared) {
    const int head = block_x() % p.launch_heads, first = block_y() * kChannels;
    const TableReader<typename M::Element, Real> bias(p, p.bias, p.first_head + head, shared.table(0), kLog2E<Real>);
    const Real scale = static_cast<Real>(p.scale), factor = scale * kLog2E<Real>;

    for_each_tile<true>(p, [&](const Tile<true>& tile, auto again) {
      const OwnRows<true> own(p, tile);
      const Pieces pieces(tile.halo(p), p.plan.slots);
      stage_own<M, D, kOwn>(shared, p, tile);
      const LeftRows<M, D> key(shared.own(0), own), value(shared.own(1), own);
      Real key_bias[2] = {0, 0}, sum[2] = {0, 0};  // sum: of score gradients over the key's queries
      Real grad_key[kChannels / 8][4] = {}, grad_value[kChannels / 8][4] = {};

      const auto issue = [&](int i, int stage) {
        stage_piece<M, D, kStaged, kScalars>(shared, stage, p, again(), pieces.piece(i));
      };
      for_each_piece(pieces.count, p.plan.stages, issue, [&](int i, int stage) {
        if (i == 0 && p.l2) {
          own_row_products<M, D>(key_bias, shared.own(0), shared.own(0), own);
          for (Real& bias_of_row : key_bias) bias_of_row *= -factor / 2;
        }
        for (Walk walk(own.partners, pieces.piece(i), p.queries); walk.more();) {
          const Unit unit = walk.next();
          Scores<Real> s, dp;
          clear(s);
          clear(dp);
          scores<M, D>(s, key, shared.rows(stage, 0), unit);
          scores<M, D>(dp, value, shared.rows(stage, 1), unit);
          const UnitPairs<true> pairs(p, tile, own, unit);
          pairs.fold(s);
          pairs.fold(dp);
          pairs.for_each_block([&](int b, const BlockPairs& block) {
            finish_scores(s[b], block, factor, bias, [&](int h, int) { return key_bias[h]; });
            NATTEN_EXT_UNROLL
            for (int e = 0; e < 4; ++e) {
              const bool valid = block.valid(e / 2, e % 2);
              const Real base = staged_scalar<Real>(shared.scalars(stage, 0), block, e % 2);
              const Real log_sum = staged_scalar<Real>(shared.scalars(stage, 1), block, e % 2);
              const Real delta = staged_scalar<Real>(shared.scalars(stage, 2), block, e % 2);
              s[b][e] = valid ? power_of_two(s[b][e] - base - log_sum) : Real(0);
              dp[b][e] = valid ? s[b][e] * (dp[b][e] - delta) : Real(0);
              sum[e / 2] += dp[b][e];
            }
          });
          pairs.unfold(s);
          pairs.unfold(dp);
          const uint32_t channel = first * sizeof(typename M::Element);
          accumulate<M, D, kChannels>(grad_value, s, shared.rows(stage, 1) + channel, unit);
          accumulate<M, D, kChannels>(grad_key, dp, shared.rows(stage, 0) + channel, unit);
        }
      });

      if (p.l2) {
        add_over_columns(sum);
        subtract_rows<M, D, kChannels>(grad_key, sum, shared.own(0), own, first);
      }
      if (p.grad_key.data != nullptr) {
        write_rows<M, D, kChannels>(grad_key, {scale, scale}, p.grad_key, shared.own(1), p, again(), own, first);
      }
      if (p.grad_value.data != nullptr) {
        write_rows<M, D, kChannels>(grad_value, {1, 1}, p.grad_value, shared.own(1), p, again(), own, first);
      }
    });
  }
};

template <class M>
void backward_query(const Params& p, const std::vector<Window>& windows, Context& context) {
  launch_all_heads<M, BackwardQuery>(p, windows, context, HeadDims<M>{});
}
template <class M>
void backward_key(const Params& p, const std::vector<Window>& windows, Context& context) {
  launch_all_heads<M, BackwardKey>(p, windows, context, HeadDims<M>{});
}

template void backward_query<NATTEN_EXT_MODE>(const Params&, const std::vector<Window>&, Context&);
template void backward_key<NATTEN_EXT_MODE>(const Params&, const std::vector<Window>&, Context&);

}  // namespace natten_ext::cuda
