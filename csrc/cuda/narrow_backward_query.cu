// Backward of windows of 7 x 7 keys, the query-centred side (narrow.h): gradients of queries and of the table, and the numbers
// of each row for the key-centred kernel. backward.cu says what corrects D.
#include "narrow_launch.h"
#include "narrow_sides.h"

namespace natten_ext::cuda {

template <class M, int Dim, bool Whole>
struct NarrowBackwardQuery : BackwardQueries<M, Dim, Whole> {
  using Queries = BackwardQueries<M, Dim, Whole>;
  using typename Queries::Element, typename Queries::Tile, typename Queries::Group, typename Queries::Columns, typename Queries::Rows;
  using typename Queries::Results, typename Queries::Table;
  using Queries::own_slot, Queries::query, Queries::grad_output, Queries::of_scores, Queries::of_products, Queries::kRows;
  enum OwnTensor { kQuery, kGradOutput, kOutput };
  // On a multiprocessor; of 32 channels, those with compute capability 8 have no shared memory for two.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  static constexpr int kBlocksAtATime = Dim == 32 ? 1 : 2;
#else
  static constexpr int kBlocksAtATime = 2;
#endif
  static constexpr uint32_t kSharedOfOrder = kBackwardShared<M, Dim, Whole>;
  static constexpr int kRowNumbers = 4;
  static constexpr bool kKeepsTile = Dim == 8;
  static constexpr bool kStartsAtD = Dim < 32 || Whole;  // products for dP, where registers allow; otherwise D comes off them
  static constexpr int kTogether = kLoadsFarAhead ? 1 : 2;  // rows that may be loaded ahead, as far as registers go

  typename Queries::Sums results;
  FrameSums<M, Tile, false> mean_key;
  float y[2], lacking[2];  // rows of dS sum to y; what they have beside it is what D lacks, and roundings

  NATTEN_EXT_DEVICE static void run(const NarrowParams& p) { Queries::template run_queries<NarrowBackwardQuery>(p); }
  NATTEN_EXT_DEVICE static void stage_keys(const NarrowParams& p, const Tile& tile) { stage_narrow_keys(p, tile); }
  NATTEN_EXT_DEVICE static void stage_own(const NarrowParams& p, const Tile& tile, const Group& group) {
    group.stage(p, tile, p.query, own_slot(kQuery));
    group.stage(p, tile, p.grad_output, own_slot(kGradOutput));
    group.stage(p, tile, p.output, own_slot(kOutput));
  }
  NATTEN_EXT_DEVICE void load(const NarrowParams& p, const Tile& tile, const Group& group) {
    query.load(own_slot(kQuery));
    grad_output.load(own_slot(kGradOutput));
    this->load_log_sum(p);
    float d[2];
    this->load_d(d, kOutput);
    Queries::load_y(y, p, tile, group);
    if constexpr (kStartsAtD) {
      Queries::start(of_products, y[0] - d[0], y[1] - d[1]);
    } else {
      NATTEN_EXT_UNROLL
      for (int e = 0; e < 4; ++e) of_products[e] = y[e / 2] - d[e / 2];
    }
  }

  // Whether results are finite. The table's sums are right in any case: those of columns that a query does not attend are never read.
  NATTEN_EXT_DEVICE bool attend(const NarrowParams& p, const Group& group, const Columns& columns, Table& table) {
    float lower[2] = {-kInfinity<float>, -kInfinity<float>};  // entries for the lower queries
    if (!group.lower) columns.load_entries(lower, 0);
    Rows keys(Tile::kKeys, group.frame), values(Tile::kValues, group.frame);
    Results key_rows(Tile::kKeys, group.frame);
    uint32_t packed[kRows][2];  // weights
    results.clear_all();
    mean_key.clear_all();
    NATTEN_EXT_UNROLL
    for (int r = 0; r < kRows; ++r) {
      packed[r][0] = packed[r][1] = 0;
      if (r == kNarrowKernel && !group.lower) continue;
      if (r % Rows::kRowsAtATime == 0) {
        keys.load(r);
        values.load(r);
      }
      float s[4], dp[4], weights[4] = {0, 0, 0, 0}, ds[4] = {0, 0, 0, 0}, upper[2] = {0, 0};
      if (r < kNarrowKernel) columns.load_entries(upper, r + 1);
      frame_products_from(s, of_scores, query, keys, r % Rows::kRowsAtATime, columns);
      if constexpr (kStartsAtD) frame_products_from(dp, of_products, grad_output, values, r % Rows::kRowsAtATime, columns);
      else frame_products(dp, grad_output, values, r % Rows::kRowsAtATime, columns);
      NATTEN_EXT_UNROLL
      for (int e = 0; e < 4; ++e) {
        const int h = e / 2, c = e % 2;
        if (!Group::may_have(r, h)) continue;
        weights[e] = power_of_two(fused_multiply_add(s[e], p.scale * kLog2E<float>, h ? lower[c] : upper[c]));
        ds[e] = weights[e] * (kStartsAtD ? dp[e] : dp[e] + of_products[e]);
        if (r == 0 && h == 1 && group.lower) weights[e] = ds[e] = 0;
        table.own[r + 1 - h][c] += ds[e];
      }
      lower[0] = upper[0], lower[1] = upper[1];
      results.add(key_rows, r, ds, columns);
      packed[r][0] = pack<Element>(weights[0], weights[1]), packed[r][1] = pack<Element>(weights[2], weights[3]);
      mean_key.template add_row_to<true>(mean_key.acc, key_rows, r, packed[r], columns);
      if (r % kTogether == kTogether - 1 && never(weights[2])) return false;
    }
    find_lacking();
    if (p.table_partials != nullptr) correct(table, packed);
    return !any_in_warp(!all_finite(results.acc));
  }

  NATTEN_EXT_DEVICE void find_lacking() {
    NATTEN_EXT_UNROLL
    for (int h = 0; h < 2; ++h) lacking[h] = results.totals[2 * h] - y[h];
  }
  // Nothing, if there are no numbers for dS: the table's gradient has no part in what is not attended.
  NATTEN_EXT_DEVICE float finite_lacking(int h) const { return lacking[h] * 0 == 0 ? lacking[h] : 0; }

  // Takes off the table's sums what came into them since D was not whole. `packed`: weights.
  NATTEN_EXT_DEVICE void correct(Table& table, const uint32_t (&packed)[kRows][2]) const {
    NATTEN_EXT_UNROLL
    for (int h = 0; h < 2; ++h) {
      const float lacking = finite_lacking(h);
      NATTEN_EXT_UNROLL
      for (int i = 0; i < 2 * kRows; ++i) {
        const int r = i / 2, c = i % 2;
        if (!Group::may_have(r, h)) continue;
        const float weight = widen(Element{static_cast<uint16_t>(packed[r][h] >> 16 * c)});
        table.own[r + 1 - h][c] = fused_multiply_add(-lacking, weight, table.own[r + 1 - h][c]);
      }
    }
  }

  // All of it in ordinary arithmetic that leaves out what no query attends; twice, the second time with the whole D. `with_table`: the
  // table's gradient too, otherwise it is there.
  NATTEN_EXT_DEVICE void attend_carefully(const NarrowParams& p, const Tile& tile, const Group& group, const Columns& columns, bool with_table) {
    const uint32_t g = narrow_lane() / 4;
    const typename Queries::LogSum log_sums[2] = {{p, tile, group, g}, {p, tile, group, g + 8}};
    Rows keys(Tile::kKeys, group.frame, true), values(Tile::kValues, group.frame, true);
    const int rows = kNarrowKernel + (group.lower ? 1 : 0);
    NATTEN_EXT_NO_UNROLL
    for (int i = 0; i < 2 * rows; ++i) {
      const int r = i < rows ? i : i - rows;
      if (i == rows) {
        find_lacking();
        NATTEN_EXT_UNROLL
        for (int e = 0; e < 4; ++e) of_products[e] -= finite_lacking(e / 2);
      }
      if (r == 0) results.clear_all(), mean_key.clear_all();
      float s[4], dp[4];
      keys.load(r);
      values.load(r);
      frame_products(s, query, keys, 0, columns);
      frame_products(dp, grad_output, values, 0, columns);
      NATTEN_EXT_UNROLL
      for (int e = 0; e < 4; ++e) {
        const int h = e / 2;
        const bool exists = columns.valid[e % 2] && group.has(r, h);
        const float entry = exists ? load_shared<float>(columns.entry(e % 2, r, h)) : 0;
        const float weight = weight_of(fused_multiply_add(s[e], p.scale * kLog2E<float>, entry), log_sums[h].base, log_sums[h].log_sum);
        s[e] = exists ? weight : kMasked<float>;
        dp[e] = exists ? product_of(weight, dp[e] + of_products[e]) : kMasked<float>;
      }
      if (with_table && i >= rows) Table::add_valid(dp, columns, r);
      const auto slot_of = [&](int column) { return group.frame + r * Tile::kColumns + columns.frame_column(column); };
      results.add_valid(Tile::kKeys, dp, slot_of);
      mean_key.add_valid(Tile::kKeys, s, slot_of);
    }
    find_lacking();
  }

  NATTEN_EXT_DEVICE void write(const NarrowParams& p, const Tile& tile, const Group& group) {
    const uint32_t lane = narrow_lane(), g = lane / 4, t = lane % 4;
    subtract_products(results.acc, lacking, mean_key.acc);
    if (p.grad_query.data != nullptr) group.template write<Element>(results.acc, {p.scale, p.scale}, p, tile, p.grad_query, Queries::result_slot());
    else sync_warp();  // the next group's rows come to where this one's are
    if (t >= 2 || !group.owns(g + 8 * t)) return;
    const float of_score = t ? of_scores[2] : of_scores[0], of_product = t ? of_products[2] - lacking[1] : of_products[0] - lacking[0];
    const uint64_t row = group.row_index(p, tile, g + 8 * t);
    Queries::store_numbers(p, row, of_score, of_product, [&] {
      const typename Queries::LogSum exact(p, row);
      return NumberParts<Element>::exactly(exact.base, exact.log_sum, -of_product);
    });
  }
};

template <class M>
std::vector<HeadRange> narrow_backward_query(const Params& p, const std::vector<Window>& windows, Context& context) {
  return launch_narrow<M, NarrowBackwardQuery>(p, windows, context, NarrowDims<M>{});
}

template std::vector<HeadRange> narrow_backward_query<NATTEN_EXT_MODE>(const Params&, const std::vector<Window>&, Context&);

}  // namespace natten_ext::cuda
