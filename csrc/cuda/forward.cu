// Forward: one block has a tile of queries, walks over the keys of its halo, and keeps a running softmax.
// The formulas of all orders are in docs/double_backward.md.
#include "launch.h"
#include "rows.h"
#include "softmax.h"

namespace natten_ext::cuda {

template <class M, int Dim, bool General>
struct Forward {
  using Real = typename M::Real;
  using Own = Side<false, General>;
  static constexpr bool kByKey = false;
  static constexpr int kOwn = 1, kStaged = 2, kScalars = 1, kTables = 1;  // query; key, value; half norms of keys; bias
  static constexpr bool kTableGradient = false;
  static constexpr int kChannels = kResultChannels<M, Dim, 128>;
  static constexpr int kBytes = Dim * sizeof(typename M::Element);
  // On a multiprocessor, as far as registers go; the code for sm_80 takes a few more of them, that for general neighborhoods and that
  // of split operands.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  static constexpr int kBlocks = M::kTensor && kBytes <= 64 ? 3 : 2;
#else
  static constexpr int kBlocks = General || M::kSplit ? (M::kTensor && kBytes <= 64 ? 3 : 2) : M::kTensor && kBytes <= 32 ? 4 : kBytes <= 128 ? 3 : 2;
#endif
  static constexpr bool kHeld = M::kTensor && Dim * sizeof(typename M::Element) <= 256;

  static void choose_tensors(Params& p) {
    p.own[0] = p.query;
    p.staged[0] = p.key;
    p.staged[1] = p.value;
  }

  NATTEN_EXT_DEVICE static void run(const ParamsOf<General>& p) {
    const SharedLayout& shared = p.shared;
    const int head = launch_head(p), first = block_y() * kChannels;
    const TableReader<typename M::Element, Real, General> bias(p, p.bias, p.first_head + head, shared.table(0), kLog2E<Real>, -kInfinity<Real>);
    const Real factor = static_cast<Real>(p.scale) * kLog2E<Real>;

    for_each_tile<Own>(p, [&](const Tile<Own>& tile, auto again) {
      const OwnRows<Own> own(p, tile);
      const Pieces<General> pieces(p, tile);
      stage_own<M, Dim, kOwn>(p, tile);
      LeftRows<M, Dim, kHeld> query(shared.own(0), own);
      Real half_norm[2] = {0, 0};  // of l2
      RunningSoftmax<Real> softmax;
      Real acc[kChannels / 8][4];

      const auto issue = [&](int i, int stage) {
        stage_piece<M, Dim, kStaged, 0>(stage, p, again().staged_side(p), pieces.piece(i));
      };
      with_care<M>([&](bool careful) {
        softmax = {};
        clear(acc);
        for_each_piece(pieces.count, p.plan.stages, issue, [&](int i, int stage) {
          const Rectangle piece = pieces.piece(i);
          const Shared half_key_norms = shared.scalars(stage, 0);
          if (p.l2) {
            write_row_products<M, Dim>(half_key_norms, shared.rows(stage, 0), shared.rows(stage, 0), piece, Real(0.5));
            sync_block();
          }
          if (i == 0) {
            query.load();
            if (p.l2) own_half_norms<M, Dim>(half_norm, shared.own(0), own);
          }
          for_each_unit(p, own, piece, [&](const Unit& unit, const UnitPairs<Own>& pairs) {
            Scores<Real> s;
            clear(s);
            scores<M, Dim>(s, query, shared.rows(stage, 0), unit, careful);
            pairs.fold(s);
            pairs.for_each_block([&](int b, const auto& block) {
              finish_scores(s[b], block, factor, bias, p.l2, half_norm,
                            [&](int c) { return staged_scalar<Real>(half_key_norms, block, c); }, needs_masks<M>(careful));
            });
            softmax.update(pairs, s, acc);
            if (needs_masks<M>(careful)) pairs.for_each_block([&](int b, const auto& block) { mark_masked(s[b], block); });
            pairs.unfold(s);
            accumulate<M, Dim, kChannels>(acc, s, shared.rows(stage, 1) + first * sizeof(typename M::Element), unit, careful);
          });
        });
        return all_finite(acc);
      });

      softmax.finish();
      const Real inverse[2] = {1 / softmax.sum[0], 1 / softmax.sum[1]};
      write_rows<M, Dim, kChannels>(acc, inverse, p.output, shared.own(0), p, again(), own, first);
      for (int h = 0; h < 2; ++h) {
        if (first == 0 && thread_index() % 4 == 0 && own.exists[h]) {
          const auto row = own.index(p, tile, h);
          store_global(static_cast<Real*>(p.base) + row, softmax.base[h]);
          store_global(static_cast<Real*>(p.log_sum) + row, softmax.log_sum(h));
          // Scores of l2 are -s|q - k|^2, to the last term.
          if (p.natural_lse != nullptr) {
            store_global(static_cast<Real*>(p.natural_lse) + row, (softmax.base[h] + softmax.log_sum(h)) / kLog2E<Real>);
          }
        }
      }
    });
  }
};

template <class M, bool General>
void forward(const Params& p, const std::vector<WindowOf<General>>& windows, Context& context) {
  launch_all<M, Forward, General>(p, windows, context, [&](auto mode) {
    using Mode = decltype(mode);
    const bool done = short_forward<Mode>(p, context) || grid_forward<Mode>(p, windows, context);
    return done ? std::vector<HeadRange>{} : narrow_forward<Mode>(p, windows, context);
  });
}
template <class M, bool General>
uint32_t forward_shared(int head_dim) {
  return least_shared<M, Forward, General>(head_dim);
}

template void forward<NATTEN_EXT_MODE, NATTEN_EXT_GENERAL>(const Params&, const std::vector<WindowOf<NATTEN_EXT_GENERAL>>&, Context&);
template uint32_t forward_shared<NATTEN_EXT_MODE, NATTEN_EXT_GENERAL>(int);

}  // namespace natten_ext::cuda
