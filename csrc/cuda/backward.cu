// Backward, in two kernels that gather what they write: the query-centred one has the gradients of queries and of the
// table, and leaves D for the key-centred one, which has those of keys and values. D = rowsum(dO * O) lacks what O lost
// by rounding; the sum of the row's dS has it. dQ has what D lacks times the mean of keys under the weights, which comes off: a
// product more. The gradient y of the log-sum-exp is taken off D.
// The formulas are in docs/double_backward.md.
#include "launch.h"
#include "rows.h"

namespace natten_ext::cuda {

template <class M, int Dim, bool General>
struct BackwardQuery {
  using Real = typename M::Real;
  using Own = Side<false, General>;
  static constexpr bool kByKey = false, kTableGradient = true;
  static constexpr int kOwn = 3, kStaged = 2, kScalars = 1, kTables = 1;  // query, grad_output, output; key, value; half norms of keys
  static constexpr int kChannels = kResultChannels<M, Dim, 96>;
  static constexpr int kBlocks = !General && Dim * sizeof(typename M::Element) <= 64 ? 3 : 2;  // on a multiprocessor, as far as registers go

  static void choose_tensors(Params& p) {
    p.own[0] = p.query;
    p.own[1] = p.grad_output;
    p.own[2] = p.output;
    p.staged[0] = p.key;
    p.staged[1] = p.value;
  }

  NATTEN_EXT_DEVICE static void run(const ParamsOf<General>& p) {
    const SharedLayout& shared = p.shared;
    const int head = launch_head(p), first = block_y() * kChannels;
    const TableReader<typename M::Element, Real, General> bias(p, p.bias, p.first_head + head, shared.table(0), kLog2E<Real>, -kInfinity<Real>);
    TableGradient<Real, General> table(p, head, block_of_head(p));
    const Real factor = static_cast<Real>(p.scale) * kLog2E<Real>;

    for_each_tile<Own>(p, [&](const Tile<Own>& tile, auto again) {
      const OwnRows<Own> own(p, tile);
      const Pieces<General> pieces(p, tile);
      stage_own<M, Dim, kOwn>(p, tile);
      const LeftRows<M, Dim> query(shared.own(0), own), grad_output(shared.own(1), own);
      const RowNumbers<Real> base(p, p.base, tile, own), log_sum(p, p.log_sum, tile, own);
      Real d[2], half_norm[2] = {0, 0};
      WeightSums<M> sums, masses;  // of dS and of the weights, as products see them
      Real acc[kChannels / 8][4], key_sums[kChannels / 8][4];

      const auto issue = [&](int i, int stage) {
        stage_piece<M, Dim, kStaged, 0>(stage, p, again().staged_side(p), pieces.piece(i));
      };
      // Rows of dS: their sums, and without `only_sums` the results. `knows_d`: D is the whole one already.
      const auto walk = [&](bool careful, bool only_sums, bool knows_d) {
        sums = masses = {};
        clear(acc);
        clear(key_sums);
        for_each_piece(pieces.count, p.plan.stages, issue, [&](int i, int stage) {
          const Rectangle piece = pieces.piece(i);
          const Shared half_key_norms = shared.scalars(stage, 0);
          if (p.l2) {
            write_row_products<M, Dim>(half_key_norms, shared.rows(stage, 0), shared.rows(stage, 0), piece, Real(0.5));
            sync_block();
          }
          if (i == 0 && !knows_d) {
            row_products<M, Dim>(d, shared.own(1), shared.own(2), own);
            const RowNumbers<Real> y(p, p.grad_lse, again(), own);
            for (int h = 0; h < 2; ++h) d[h] -= y[h];
            if (p.l2) own_half_norms<M, Dim>(half_norm, shared.own(0), own);
          }
          for_each_unit(p, own, piece, [&](const Unit& unit, const UnitPairs<Own>& pairs) {
            Scores<Real> s, dp;
            clear(s);
            clear(dp);
            scores<M, Dim>(s, query, shared.rows(stage, 0), unit, careful);
            scores<M, Dim>(dp, grad_output, shared.rows(stage, 1), unit, careful);
            pairs.fold(s);
            pairs.fold(dp);
            pairs.for_each_block([&](int b, const auto& block) {
              finish_scores(s[b], block, factor, bias, p.l2, half_norm,
                            [&](int c) { return staged_scalar<Real>(half_key_norms, block, c); }, needs_masks<M>(careful));
              NATTEN_EXT_UNROLL
              for (int e = 0; e < 4; ++e) {
                s[b][e] = weight_of(s[b][e], base[e / 2], log_sum[e / 2]);
                dp[b][e] = product_of(s[b][e], dp[b][e] - d[e / 2]);
              }
              if (needs_masks<M>(careful)) mark_masked(s[b], block);
              if (needs_masks<M>(careful) || table) mark_masked(dp[b], block);
            });
            pairs.unfold(s);
            pairs.unfold(dp);
            sums.add(dp);
            if (only_sums) return;
            if (table && !careful) table.add(dp, own, unit, tile.x.kernel);
            const Shared keys = shared.rows(stage, 0) + first * sizeof(typename M::Element);
            accumulate<M, Dim, kChannels>(acc, dp, keys, unit, careful);
            masses.add(s);
            accumulate<M, Dim, kChannels>(key_sums, s, keys, unit, careful);
          });
        });
      };
      with_care<M>([&](bool careful) {
        // Sums of the table's gradient can't be corrected later: for them D is made whole first.
        NATTEN_EXT_NO_UNROLL
        for (int i = table ? 0 : 1; i < 2; ++i) {
          walk(careful, i == 0, table && i == 1);
          const RowNumbers<Real> y(p, p.grad_lse, again(), own);
          for (int h = 0; h < 2 && i == 0; ++h) {
            const Real lacking = sums[h] - y[h];
            if (lacking * 0 == 0) d[h] += lacking;  // not if float16 has no numbers for dS: the table's gradient, in float32, may have them
          }
        }
        return all_finite(acc);
      });

      // Rows of dS sum to y. What is left over is what D lacks, and roundings.
      const RowNumbers<Real> y(p, p.grad_lse, again(), own);
      const Real lacking[2] = {sums[0] - y[0], sums[1] - y[1]};
      // Rounded weights do not sum to one, and keys may be large.
      const Real multiples[2] = {lacking[0] / masses[0], lacking[1] / masses[1]};
      subtract_products(acc, multiples, key_sums);
      if (p.l2 && p.grad_lse != nullptr) subtract_rows<M, Dim, kChannels>(acc, y, shared.own(0), own, first);
      if (p.grad_query.data != nullptr) {
        const Real scale = static_cast<Real>(p.scale);
        write_rows<M, Dim, kChannels>(acc, {scale, scale}, p.grad_query, shared.own(2), p, again(), own, first);
      }
      for (int h = 0; h < 2 && first == 0; ++h) {
        write_row_numbers<4>(p, again(), own, h, {base[h], log_sum[h], d[h] + lacking[h], half_norm[h]});
      }
    });
    table.write_partial();
  }
};

template <class M, int Dim, bool General>
struct BackwardKey {
  using Real = typename M::Real;
  using Own = Side<true, General>;
  static constexpr bool kByKey = true, kTableGradient = false;
  static constexpr int kOwn = 2, kStaged = 2, kScalars = 4, kTables = 1;  // key, value; query, grad_output; RowNumber
  static constexpr int kChannels = kResultChannels<M, Dim, 96>;
  static constexpr int kBlocks = !General && Dim * sizeof(typename M::Element) <= 64 ? 3 : 2;  // on a multiprocessor, as far as registers go

  static void choose_tensors(Params& p) {
    p.own[0] = p.key;
    p.own[1] = p.value;
    p.staged[0] = p.query;
    p.staged[1] = p.grad_output;
  }

  NATTEN_EXT_DEVICE static void run(const ParamsOf<General>& p) {
    const SharedLayout& shared = p.shared;
    const int head = launch_head(p), first = block_y() * kChannels;
    const auto tables = tables_of_key_head<typename M::Element, Real>(p, p.bias, p.first_head + head, 0, kLog2E<Real>, -kInfinity<Real>);
    const Real scale = static_cast<Real>(p.scale), factor = scale * kLog2E<Real>;

    for_each_tile<Own>(p, [&](const Tile<Own>& tile, auto again) {
      const OwnRows<Own> own(p, tile);
      const Pieces<General> pieces(p, tile);
      stage_own<M, Dim, kOwn>(p, tile);
      const LeftRows<M, Dim> key(shared.own(0), own), value(shared.own(1), own);
      Real half_norm[2] = {0, 0};
      WeightSums<M> sums;  // of dS over the key's queries
      Real grad_key[kChannels / 8][4], grad_value[kChannels / 8][4];

      const auto issue = [&](int i, int stage) {
        const Turn turn = turn_of(i, pieces);
        stage_piece<M, Dim, kStaged, kScalars>(stage, p, again().staged_side(p, turn.member), pieces.piece(turn.piece));
      };
      with_care<M>([&](bool careful) {
        sums = {};
        clear(grad_key);
        clear(grad_value);
        for_each_piece(pieces_in_turns(p, pieces), p.plan.stages, issue, [&](int i, int stage) {
          if (i == 0 && p.l2) own_half_norms<M, Dim>(half_norm, shared.own(0), own);
          const Turn turn = turn_of(i, pieces);
          const auto bias = tables.of_member(turn.member);
          for_each_unit(p, own, pieces.piece(turn.piece), [&](const Unit& unit, const UnitPairs<Own>& pairs) {
            Scores<Real> s, dp;
            clear(s);
            clear(dp);
            scores<M, Dim>(s, key, shared.rows(stage, 0), unit, careful);
            scores<M, Dim>(dp, value, shared.rows(stage, 1), unit, careful);
            pairs.fold(s);
            pairs.fold(dp);
            pairs.for_each_block([&](int b, const auto& block) {
              const StagedNumbers<Real, kScalars> numbers(shared.scalars(stage, 0), block);
              finish_scores(s[b], block, factor, bias, p.l2, half_norm, [&](int c) { return numbers(kHalfNorm, c); },
                            needs_masks<M>(careful));
              NATTEN_EXT_UNROLL
              for (int e = 0; e < 4; ++e) {
                s[b][e] = weight_of(s[b][e], numbers(kBase, e % 2), numbers(kLogSum, e % 2));
                dp[b][e] = product_of(s[b][e], dp[b][e] - numbers(kD, e % 2));
              }
              if (needs_masks<M>(careful)) {
                mark_masked(s[b], block);
                mark_masked(dp[b], block);
              }
            });
            pairs.unfold(s);
            pairs.unfold(dp);
            if (p.l2) sums.add(dp);
            const uint32_t channel = first * sizeof(typename M::Element);
            accumulate<M, Dim, kChannels>(grad_value, s, shared.rows(stage, 1) + channel, unit, careful);
            accumulate<M, Dim, kChannels>(grad_key, dp, shared.rows(stage, 0) + channel, unit, careful);
          });
        });
        return all_finite(grad_key) && all_finite(grad_value);
      });

      if (p.l2) subtract_rows<M, Dim, kChannels>(grad_key, sums, shared.own(0), own, first);
      if (p.grad_key.data != nullptr) {
        write_rows<M, Dim, kChannels>(grad_key, {scale, scale}, p.grad_key, shared.own(1), p, again(), own, first);
      }
      if (p.grad_value.data != nullptr) {
        write_rows<M, Dim, kChannels>(grad_value, {1, 1}, p.grad_value, shared.own(1), p, again(), own, first);
      }
    });
  }
};

template <class M, bool General>
void backward_query(const Params& p, const std::vector<WindowOf<General>>& windows, Context& context) {
  launch_all<M, BackwardQuery, General>(p, windows, context, [&](auto mode) {
    using Mode = decltype(mode);
    const bool done = short_backward<Mode>(p, context) || grid_backward<Mode>(p, windows, context) ||
                    grid_wide_backward<Mode>(p, windows, context);
    return done ? std::vector<HeadRange>{} : narrow_backward_query<Mode>(p, windows, context);
  });
}
template <class M, bool General>
void backward_key(const Params& p, const std::vector<WindowOf<General>>& windows, Context& context) {
  if constexpr (General) {
    launch_key_heads<M, BackwardKey>(p, windows, context);
  } else {
    launch_all<M, BackwardKey, General>(p, windows, context, [&](auto mode) {
      using Mode = decltype(mode);
      const bool done = short_backward_takes<Mode>(p, context) || grid_backward_takes<Mode>(p, windows, context) ||
                      grid_wide_backward_takes<Mode>(p, windows, context);
      return done ? std::vector<HeadRange>{} : narrow_backward_key<Mode>(p, windows, context);
    });
  }
}
template <class M, bool General>
uint32_t backward_shared(int head_dim) {
  return std::max(least_shared<M, BackwardQuery, General>(head_dim), least_shared<M, BackwardKey, General>(head_dim));
}

template void backward_query<NATTEN_EXT_MODE, NATTEN_EXT_GENERAL>(const Params&, const std::vector<WindowOf<NATTEN_EXT_GENERAL>>&, Context&);
template void backward_key<NATTEN_EXT_MODE, NATTEN_EXT_GENERAL>(const Params&, const std::vector<WindowOf<NATTEN_EXT_GENERAL>>&, Context&);
template uint32_t backward_shared<NATTEN_EXT_MODE, NATTEN_EXT_GENERAL>(int);

}  // namespace natten_ext::cuda
