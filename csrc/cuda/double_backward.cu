// Double backward, in two kernels like the backward. The query-centred one goes over the keys twice: the first pass
// gives the row sums r and t, the second the gradients. Where the whole halo is one piece, the second pass finds it in
// shared memory. The formulas are in docs/double_backward.md.
#include "launch.h"
#include "rows.h"

namespace natten_ext::cuda {

// The four products that both kernels make of a unit, and what becomes of them.
template <class Real>
struct PairTerms {
  Scores<Real> p, dp, x, g;  // P, dP, X, G

  NATTEN_EXT_DEVICE PairTerms() {
    clear(p);
    clear(dp);
    clear(x);
    clear(g);
  }
  template <class Own>
  NATTEN_EXT_DEVICE void fold(const UnitPairs<Own>& pairs) {
    pairs.fold(p);
    pairs.fold(dp);
    pairs.fold(x);
    pairs.fold(g);
  }
  template <class Own>
  NATTEN_EXT_DEVICE void unfold(const UnitPairs<Own>& pairs) {
    pairs.unfold(p);
    pairs.unfold(dp);
    pairs.unfold(x);
    pairs.unfold(g);
  }
  template <bool General>
  NATTEN_EXT_DEVICE void mask(int b, const BlockPairs<General>& pairs) {
    mark_masked(p[b], pairs);
    mark_masked(dp[b], pairs);
    mark_masked(x[b], pairs);
    mark_masked(g[b], pairs);
  }
  // Sb = P ((X - r) (dP - D) + G - t) in x, dS = P (dP - D) in dp, and P (X - r) in g.
  NATTEN_EXT_DEVICE void to_gradients(int b, int e, Real d, Real r, Real t) {
    const Real centred = dp[b][e] - d, deviation = x[b][e] - r;
    x[b][e] = product_of(p[b][e], fused_multiply_add(deviation, centred, g[b][e] - t));
    dp[b][e] = product_of(p[b][e], centred);
    g[b][e] = product_of(p[b][e], deviation);
  }
};

template <class M, int Dim, bool General>
struct DoubleBackwardQuery {
  using Real = typename M::Real;
  using Own = Side<false, General>;
  static constexpr bool kByKey = false, kTableGradient = true;
  static constexpr int kOwn = 4, kStaged = 4, kScalars = 2, kTables = 2;
  static constexpr int kChannels = kResultChannels<M, Dim, 64>;
  static constexpr int kBlocks = M::kTensor && !M::kSplit && Dim <= 8 ? 3 : 2;  // on a multiprocessor, as far as registers go
  enum OwnTensor { kQuery, kGradOutput, kCotQuery, kOutput };
  enum StagedTensor { kKey, kValue, kCotKey, kCotValue };
  enum KeyNumber { kHalfKeyNorm, kCotKeyProduct };  // of l2, per staged row: |k|^2 / 2, gK.k

  static void choose_tensors(Params& p) {
    p.own[0] = p.query;
    p.own[1] = p.tangents_only ? Rows{} : p.grad_output;
    p.own[2] = p.cot_query;
    p.own[3] = p.tangents_only ? Rows{} : p.output;
    p.staged[0] = p.key;
    p.staged[1] = p.value;
    p.staged[2] = p.cot_key;
    p.staged[3] = p.cot_value;
  }

  NATTEN_EXT_DEVICE static void run(const ParamsOf<General>& p) {
    const SharedLayout& shared = p.shared;
    using Element = typename M::Element;
    const int head = launch_head(p), first = block_y() * kChannels;
    const TableReader<Element, Real, General> bias(p, p.bias, p.first_head + head, shared.table(0), kLog2E<Real>, -kInfinity<Real>);
    const TableReader<Element, Real, General> cot_bias(p, p.cot_bias, p.first_head + head, shared.table(1), 1, 0);
    TableGradient<Real, General> table(p, head, block_of_head(p));
    const Real scale = static_cast<Real>(p.scale), factor = scale * kLog2E<Real>;
    const bool has_cot_query = p.cot_query.data != nullptr, has_cot_key = p.cot_key.data != nullptr;
    const bool has_cot_value = p.cot_value.data != nullptr, has_grad_query = p.grad_query.data != nullptr;

    for_each_tile<Own>(p, [&](const Tile<Own>& tile, auto again) {
      const OwnRows<Own> own(p, tile);
      const Pieces<General> pieces(p, tile);
      stage_own<M, Dim, kOwn>(p, tile);
      const LeftRows<M, Dim> query(shared.own(kQuery), own), grad_output(shared.own(kGradOutput), own);
      const LeftRows<M, Dim> cot_query(shared.own(kCotQuery), own);
      const RowNumbers<Real> base(p, p.base, tile, own), log_sum(p, p.log_sum, tile, own);

      const auto issue = [&](int i, int stage) {
        stage_piece<M, Dim, kStaged, 0>(stage, p, again().staged_side(p), pieces.piece(i));
      };
      const auto write_key_terms = [&](int i, int stage) {
        if (!p.l2) return;
        const Rectangle piece = pieces.piece(i);
        const Shared keys = shared.rows(stage, kKey);
        write_row_products<M, Dim>(shared.scalars(stage, kHalfKeyNorm), keys, keys, piece, Real(0.5));
        if (has_cot_key) {
          write_row_products<M, Dim>(shared.scalars(stage, kCotKeyProduct), shared.rows(stage, kCotKey), keys, piece, Real(1));
        }
        sync_block();
      };
      Real half_norm[2] = {0, 0}, cot_product[2] = {0, 0};  // of l2: |q|^2 / 2, gQ.q
      // Calls `use(unit, pairs, terms)` for every unit of a staged piece; the terms are folded.
      const auto for_each_terms = [&](int i, int stage, bool careful, auto use) {
        const bool masks = needs_masks<M>(careful);
        for_each_unit(p, own, pieces.piece(i), [&](const Unit& unit, const UnitPairs<Own>& pairs) {
          PairTerms<Real> terms;
          scores<M, Dim>(terms.p, query, shared.rows(stage, kKey), unit, careful);
          if (!p.tangents_only) scores<M, Dim>(terms.dp, grad_output, shared.rows(stage, kValue), unit, careful);
          if (has_cot_query) scores<M, Dim>(terms.x, cot_query, shared.rows(stage, kKey), unit, careful);
          if (has_cot_key) scores<M, Dim>(terms.x, query, shared.rows(stage, kCotKey), unit, careful);
          if (has_cot_value && !p.tangents_only) scores<M, Dim>(terms.g, grad_output, shared.rows(stage, kCotValue), unit, careful);
          terms.fold(pairs);
          pairs.for_each_block([&](int b, const auto& block) {
            finish_scores(terms.p[b], block, factor, bias, p.l2, half_norm,
                          [&](int c) { return staged_scalar<Real>(shared.scalars(stage, kHalfKeyNorm), block, c); }, masks);
            finish_scores(terms.x[b], block, scale, cot_bias, p.l2, cot_product, [&](int c) {
              return has_cot_key ? staged_scalar<Real>(shared.scalars(stage, kCotKeyProduct), block, c) : Real(0);
            }, masks);
            NATTEN_EXT_UNROLL
            for (int e = 0; e < 4; ++e) terms.p[b][e] = weight_of(terms.p[b][e], base[e / 2], log_sum[e / 2]);
          });
          use(unit, pairs, terms);
        });
      };

      // D, r, t, and `product`, that is e. First D is rowsum(dO * O), to which the sum over the keys adds what O lost by
      // rounding: with dP counted from there, nothing cancels that is larger than the result.
      Real d[2] = {0, 0}, sums[5][2];
      auto &mass = sums[0], &lacking = sums[1], &r = sums[2], &product = sums[3], &t = sums[4];
      with_care<M>([&](bool careful) {
        for (auto& sum : sums) sum[0] = sum[1] = 0;
        for_each_piece(pieces.count, p.plan.stages, issue, [&](int i, int stage) {
          write_key_terms(i, stage);
          if (i == 0) {
            if (!p.tangents_only) row_products<M, Dim>(d, shared.own(kGradOutput), shared.own(kOutput), own);
            if (p.l2) own_half_norms<M, Dim>(half_norm, shared.own(kQuery), own);
            if (p.l2 && has_cot_query) row_products<M, Dim>(cot_product, shared.own(kCotQuery), shared.own(kQuery), own);
          }
          const bool masks = needs_masks<M>(careful);
          for_each_terms(i, stage, careful, [&](const Unit&, const UnitPairs<Own>& pairs, PairTerms<Real>& terms) {
            pairs.for_each_block([&](int b, const auto& block) {
              if (masks) terms.mask(b, block);
              NATTEN_EXT_UNROLL
              for (int e = 0; e < 4; ++e) {
                mass[e / 2] += terms.p[b][e];
                r[e / 2] = fused_multiply_add(terms.p[b][e], terms.x[b][e], r[e / 2]);
              }
              if (p.tangents_only) return;
              NATTEN_EXT_UNROLL
              for (int e = 0; e < 4; ++e) {
                const int h = e / 2;
                const Real weighted = terms.p[b][e] * (terms.dp[b][e] - d[h]);
                lacking[h] += weighted;
                product[h] = fused_multiply_add(weighted, terms.x[b][e], product[h]);
                t[h] = fused_multiply_add(terms.p[b][e], terms.g[b][e], t[h]);
              }
            });
          });
        });
        return all_finite(sums);
      });
      for (auto& sum : sums) add_over_columns(sum);
      for (int h = 0; h < 2; ++h) {  // weights sum to 1 up to roundings only, which large X would show
        const Real inverse = own.exists[h] ? 1 / mass[h] : Real(0);
        r[h] *= inverse;
        t[h] = (t[h] + fused_multiply_add(-lacking[h], r[h], product[h])) * inverse;
        d[h] += lacking[h];
      }
      const RowNumbers<Real> grad_lse(p, p.grad_lse, again(), own);
      for (int h = 0; h < 2; ++h) d[h] -= grad_lse[h];  // t does not change with it, since rows of P (X - r) sum to zero
      for (int h = 0; h < 2 && first == 0; ++h) {
        if (!p.tangents_only) {
          write_row_numbers<8>(p, again(), own, h,
                               {base[h], log_sum[h], d[h], half_norm[h], r[h], t[h], cot_product[h], Real(0)});
        }
        if (p.grad_grad_lse != nullptr && thread_index() % 4 == 0 && own.exists[h]) {
          store_global(static_cast<Real*>(p.grad_grad_lse) + own.index(p, again(), h), r[h]);
        }
      }
      if (!has_grad_query && p.grad_grad_output.data == nullptr && !table) return;

      WeightSums<M> score_sums, first_sums, value_sums;  // of Sb, dS and P (X - r)
      Real grad_query[kChannels / 8][4], grad_grad_output[kChannels / 8][4];
      // A halo of one piece is there still, and so are its terms.
      const bool staged_again = pieces.count > 1;
      const auto issue_again = [&](int i, int stage) {
        if (staged_again) issue(i, stage);
      };
      with_care<M>([&](bool careful) {
        score_sums = first_sums = value_sums = {};
        clear(grad_query);
        clear(grad_grad_output);
        for_each_piece(pieces.count, p.plan.stages, issue_again, [&](int i, int stage) {
          if (staged_again) write_key_terms(i, stage);
          const bool masks = needs_masks<M>(careful);
          for_each_terms(i, stage, careful, [&](const Unit& unit, const UnitPairs<Own>& pairs, PairTerms<Real>& terms) {
            pairs.for_each_block([&](int b, const auto& block) {
              NATTEN_EXT_UNROLL
              for (int e = 0; e < 4; ++e) terms.to_gradients(b, e, d[e / 2], r[e / 2], t[e / 2]);
              if (masks) terms.mask(b, block);
              else if (table) mark_masked(terms.x[b], block);
            });
            terms.unfold(pairs);
            if (table && !careful) table.add(terms.x, own, unit, tile.x.kernel);
            const auto rows = [&](StagedTensor tensor) { return shared.rows(stage, tensor) + first * sizeof(Element); };
            value_sums.add(terms.g);
            accumulate<M, Dim, kChannels>(grad_grad_output, terms.g, rows(kValue), unit, careful);
            if (has_cot_value) accumulate<M, Dim, kChannels>(grad_grad_output, terms.p, rows(kCotValue), unit, careful);
            if (!has_grad_query) return;
            score_sums.add(terms.x);
            accumulate<M, Dim, kChannels>(grad_query, terms.x, rows(kKey), unit, careful);
            if (has_cot_key) {
              first_sums.add(terms.dp);
              accumulate<M, Dim, kChannels>(grad_query, terms.dp, rows(kCotKey), unit, careful);
            }
          });
        });
        return all_finite(grad_query) && all_finite(grad_grad_output);
      });
      // Rows of Sb and of P (X - r) sum to zero, those of dS to y.
      const RowNumbers<Real> y(p, p.grad_lse, again(), own);
      if (p.l2 && has_cot_query && p.grad_lse != nullptr) {
        subtract_rows<M, Dim, kChannels>(grad_query, y, shared.own(kCotQuery), own, first);
        sync_warp();
      }
      // The tile's own rows are needed no more.
      stage_own_keys<M, Dim>(shared.own(kQuery), p.key, p, again().staged_side(p), own);
      stage_own_keys<M, Dim>(shared.own(kGradOutput), p.value, p, again().staged_side(p), own);
      if (has_cot_key) stage_own_keys<M, Dim>(shared.own(kCotQuery), p.cot_key, p, again().staged_side(p), own);
      await_own_keys();
      subtract_rows<M, Dim, kChannels>(grad_grad_output, value_sums, shared.own(kGradOutput), own, first);
      if (has_grad_query) {
        subtract_rows<M, Dim, kChannels>(grad_query, score_sums, shared.own(kQuery), own, first);
        if (has_cot_key) {
          const Real left_over[2] = {first_sums[0] - y[0], first_sums[1] - y[1]};
          subtract_rows<M, Dim, kChannels>(grad_query, left_over, shared.own(kCotQuery), own, first);
        }
        write_rows<M, Dim, kChannels>(grad_query, {scale, scale}, p.grad_query, shared.own(kOutput), p, again(), own, first);
      }
      if (p.grad_grad_output.data != nullptr) {
        write_rows<M, Dim, kChannels>(grad_grad_output, {1, 1}, p.grad_grad_output, shared.own(kOutput), p, again(), own, first);
      }
    });
    table.write_partial();
  }
};

template <class M, int Dim, bool General>
struct DoubleBackwardKey {
  using Real = typename M::Real;
  using Own = Side<true, General>;
  static constexpr bool kByKey = true, kTableGradient = false;
  static constexpr int kOwn = 4, kStaged = 3, kScalars = 8, kTables = 2;
  static constexpr int kChannels = kResultChannels<M, Dim, 96>;
  static constexpr int kBlocks = M::kTensor && !M::kSplit && Dim <= 8 ? 3 : 2;  // on a multiprocessor, as far as registers go
  enum OwnTensor { kKey, kValue, kCotKey, kCotValue };
  enum StagedTensor { kQuery, kGradOutput, kCotQuery };

  static void choose_tensors(Params& p) {
    p.own[0] = p.key;
    p.own[1] = p.value;
    p.own[2] = p.cot_key;
    p.own[3] = p.cot_value;
    p.staged[0] = p.query;
    p.staged[1] = p.grad_output;
    p.staged[2] = p.cot_query;
  }

  NATTEN_EXT_DEVICE static void run(const ParamsOf<General>& p) {
    const SharedLayout& shared = p.shared;
    using Element = typename M::Element;
    const int head = launch_head(p), first = block_y() * kChannels;
    const auto tables = tables_of_key_head<Element, Real>(p, p.bias, p.first_head + head, 0, kLog2E<Real>, -kInfinity<Real>);
    const auto cot_tables = tables_of_key_head<Element, Real>(p, p.cot_bias, p.first_head + head, 1, 1, 0);
    const Real scale = static_cast<Real>(p.scale), factor = scale * kLog2E<Real>;
    const bool has_cot_query = p.cot_query.data != nullptr, has_cot_key = p.cot_key.data != nullptr;
    const bool has_cot_value = p.cot_value.data != nullptr;

    for_each_tile<Own>(p, [&](const Tile<Own>& tile, auto again) {
      const OwnRows<Own> own(p, tile);
      const Pieces<General> pieces(p, tile);
      stage_own<M, Dim, kOwn>(p, tile);
      const LeftRows<M, Dim> key(shared.own(kKey), own), value(shared.own(kValue), own);
      const LeftRows<M, Dim> cot_key(shared.own(kCotKey), own), cot_value(shared.own(kCotValue), own);
      Real half_norm[2] = {0, 0}, cot_product[2] = {0, 0};  // of l2: |k|^2 / 2, gK.k
      WeightSums<M> score_sums, first_sums;  // of Sb and dS over the key's queries
      Real grad_key[kChannels / 8][4], grad_value[kChannels / 8][4];

      const auto issue = [&](int i, int stage) {
        const Turn turn = turn_of(i, pieces);
        stage_piece<M, Dim, kStaged, kScalars>(stage, p, again().staged_side(p, turn.member), pieces.piece(turn.piece));
      };
      with_care<M>([&](bool careful) {
        score_sums = first_sums = {};
        clear(grad_key);
        clear(grad_value);
        for_each_piece(pieces_in_turns(p, pieces), p.plan.stages, issue, [&](int i, int stage) {
          if (i == 0 && p.l2) {
            own_half_norms<M, Dim>(half_norm, shared.own(kKey), own);
            if (has_cot_key) row_products<M, Dim>(cot_product, shared.own(kCotKey), shared.own(kKey), own);
          }
          const Turn turn = turn_of(i, pieces);
          const auto bias = tables.of_member(turn.member), cot_bias = cot_tables.of_member(turn.member);
          for_each_unit(p, own, pieces.piece(turn.piece), [&](const Unit& unit, const UnitPairs<Own>& pairs) {
            PairTerms<Real> terms;
            scores<M, Dim>(terms.p, key, shared.rows(stage, kQuery), unit, careful);
            scores<M, Dim>(terms.dp, value, shared.rows(stage, kGradOutput), unit, careful);
            if (has_cot_query) scores<M, Dim>(terms.x, key, shared.rows(stage, kCotQuery), unit, careful);
            if (has_cot_key) scores<M, Dim>(terms.x, cot_key, shared.rows(stage, kQuery), unit, careful);
            if (has_cot_value) scores<M, Dim>(terms.g, cot_value, shared.rows(stage, kGradOutput), unit, careful);
            const bool masks = needs_masks<M>(careful);
            terms.fold(pairs);
            pairs.for_each_block([&](int b, const auto& block) {
              const StagedNumbers<Real, kScalars> numbers(shared.scalars(stage, 0), block);
              finish_scores(terms.p[b], block, factor, bias, p.l2, half_norm, [&](int c) { return numbers(kHalfNorm, c); }, masks);
              finish_scores(terms.x[b], block, scale, cot_bias, p.l2, cot_product, [&](int c) { return numbers(kCotProduct, c); }, masks);
              NATTEN_EXT_UNROLL
              for (int e = 0; e < 4; ++e) {
                terms.p[b][e] = weight_of(terms.p[b][e], numbers(kBase, e % 2), numbers(kLogSum, e % 2));
              }
              NATTEN_EXT_UNROLL
              for (int e = 0; e < 4; ++e) {
                terms.to_gradients(b, e, numbers(kD, e % 2), numbers(kR, e % 2), numbers(kT, e % 2));
              }
              if (masks) terms.mask(b, block);
            });
            terms.unfold(pairs);
            if (p.l2) {
              score_sums.add(terms.x);
              if (has_cot_key) first_sums.add(terms.dp);
            }
            const uint32_t channel = first * sizeof(Element);
            accumulate<M, Dim, kChannels>(grad_value, terms.g, shared.rows(stage, kGradOutput) + channel, unit, careful);
            accumulate<M, Dim, kChannels>(grad_key, terms.x, shared.rows(stage, kQuery) + channel, unit, careful);
            if (has_cot_query) {
              accumulate<M, Dim, kChannels>(grad_key, terms.dp, shared.rows(stage, kCotQuery) + channel, unit, careful);
            }
          });
        });
        return all_finite(grad_key) && all_finite(grad_value);
      });

      if (p.l2) {
        subtract_rows<M, Dim, kChannels>(grad_key, score_sums, shared.own(kKey), own, first);
        if (has_cot_key) subtract_rows<M, Dim, kChannels>(grad_key, first_sums, shared.own(kCotKey), own, first);
      }
      if (p.grad_key.data != nullptr) {
        write_rows<M, Dim, kChannels>(grad_key, {scale, scale}, p.grad_key, shared.own(kValue), p, again(), own, first);
      }
      if (p.grad_value.data != nullptr) {
        write_rows<M, Dim, kChannels>(grad_value, {1, 1}, p.grad_value, shared.own(kValue), p, again(), own, first);
      }
    });
  }
};

template <class M, bool General>
void double_backward_query(const Params& p, const std::vector<WindowOf<General>>& windows, Context& context) {
  launch_all<M, DoubleBackwardQuery, General>(p, windows, context, [&](auto mode) {
    using Mode = decltype(mode);
    const bool taken = short_double_backward<Mode>(p, context) || grid_double_backward<Mode>(p, windows, context);
    return taken ? std::vector<HeadRange>{} : narrow_double_backward_query<Mode>(p, windows, context);
  });
}
template <class M, bool General>
void double_backward_key(const Params& p, const std::vector<WindowOf<General>>& windows, Context& context) {
  if constexpr (General) {
    launch_key_heads<M, DoubleBackwardKey>(p, windows, context);
  } else {
    launch_all<M, DoubleBackwardKey, General>(p, windows, context, [&](auto mode) {
      using Mode = decltype(mode);
      const bool taken = short_double_backward_takes<Mode>(p, context) || grid_double_backward_takes<Mode>(p, windows, context);
      return taken ? std::vector<HeadRange>{} : narrow_double_backward_key<Mode>(p, windows, context);
    });
  }
}
template <class M, bool General>
uint32_t double_backward_shared(int head_dim) {
  return std::max(least_shared<M, DoubleBackwardQuery, General>(head_dim), least_shared<M, DoubleBackwardKey, General>(head_dim));
}

template void double_backward_query<NATTEN_EXT_MODE, NATTEN_EXT_GENERAL>(const Params&, const std::vector<WindowOf<NATTEN_EXT_GENERAL>>&, Context&);
template void double_backward_key<NATTEN_EXT_MODE, NATTEN_EXT_GENERAL>(const Params&, const std::vector<WindowOf<NATTEN_EXT_GENERAL>>&, Context&);
template uint32_t double_backward_shared<NATTEN_EXT_MODE, NATTEN_EXT_GENERAL>(int);

}  // namespace natten_ext::cuda
