// Double backward of windows of 7 x 7 keys, the query-centred side (narrow.h): gradients of queries, grad_output and the table, and the
// numbers of each row for the key-centred kernel. A warp goes over a frame twice, for the sums of rows and for the gradients, and keeps
// the weights of all its pairs in registers. double_backward.cu and docs/double_backward.md say what is computed.
#include "narrow_launch.h"
#include "narrow_sides.h"

namespace natten_ext::cuda {

template <class M, int Dim, bool Whole>
struct NarrowDoubleBackwardQuery : DoubleBackwardQueries<M, NarrowDoubleBackwardQueryPlaces<Dim, Whole>> {
  using Places = NarrowDoubleBackwardQueryPlaces<Dim, Whole>;
  using Queries = DoubleBackwardQueries<M, Places>;
  using typename Queries::Element, typename Queries::Tile, typename Queries::Group, typename Queries::Columns, typename Queries::Rows;
  using typename Queries::Results, typename Queries::Sums, typename Queries::Table;
  using Queries::own_slot, Queries::query, Queries::grad_output, Queries::of_scores, Queries::of_products, Queries::kRows;
  enum OwnTensor { kQuery, kGradOutput, kOutput, kCotQuery };
  // On a multiprocessor; those with compute capability 8 have shared memory for two of 16 channels.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  static constexpr int kBlocksAtATime = Dim == 8 ? 3 : 2;
#else
  static constexpr int kBlocksAtATime = Dim == 32 ? 2 : 3;
#endif
  static constexpr uint32_t kSharedOfOrder = kDoubleBackwardShared<M, Dim, Whole>;
  static constexpr int kRowNumbers = 8;
  static constexpr bool kKeepsTile = false;
  // Whether products for G start at -t, where registers allow; otherwise t comes off them.
  static constexpr bool kStartsAtT = Dim == 32 || (!kLoadsFarAhead && (Dim == 8 || Whole));
  static constexpr int kTogether = (kLoadsFarAhead && Dim == 8) || (Dim == 32 && !Whole) ? 1 : 2;  // rows that may be loaded ahead, as far as registers go

  NarrowLeft<M, Tile> cot_query;
  float y[2], r[2];
  float of_g[4];  // where products of G start: at -t
  Sums grad_query, grad_grad_output;  // with the sums of Sb and of P (X - r)
  Sums first;                         // the sum of dS

  NATTEN_EXT_DEVICE static void run(const NarrowParams& p) { Queries::template run_queries<NarrowDoubleBackwardQuery>(p); }
  NATTEN_EXT_DEVICE static void stage_keys(const NarrowParams& p, const Tile& tile) {
    stage_narrow_halo<Tile::kChunks>(p, tile, {&p.key, &p.value, &p.cot_key, &p.cot_value},
                                     {Tile::kKeys, Tile::kValues, Places::kCotKeys, Places::kCotValues}, p.head_bytes);
  }
  NATTEN_EXT_DEVICE static void stage_own(const NarrowParams& p, Tile tile, const Group& group) {
    tile.head = forget(tile.head), tile.batch = forget(tile.batch);  // so that no addresses are kept
    group.stage(p, tile, p.query, own_slot(kQuery));
    group.stage(p, tile, p.grad_output, own_slot(kGradOutput));
    group.stage(p, tile, p.output, own_slot(kOutput));
    group.stage(p, tile, p.cot_query, own_slot(kCotQuery));
  }
  NATTEN_EXT_DEVICE void load(const NarrowParams& p, const Tile& tile, const Group& group) {
    query.load(own_slot(kQuery));
    grad_output.load(own_slot(kGradOutput));
    cot_query.load(own_slot(kCotQuery));
    this->load_log_sum(p);
    float d[2];
    this->load_d(d, kOutput);
    Queries::load_y(y, p, tile, group);
    Queries::start(of_products, -d[0], -d[1]);
  }

  // What is staged of the frame, as right operands of scores.
  struct Staged {
    Rows keys, values, cot_keys, cot_values;
    NATTEN_EXT_DEVICE explicit Staged(uint32_t frame, bool one = false)
        : keys(Tile::kKeys, frame, one), values(Tile::kValues, frame, one), cot_keys(Places::kCotKeys, frame, one),
          cot_values(Places::kCotValues, frame, one) {}
    NATTEN_EXT_DEVICE void load(int row) {
      keys.load(row);
      values.load(row);
      cot_keys.load(row);
      cot_values.load(row);
    }
  };
  // The products of a frame row's pairs: of S, dP, X and G. `row`: after the one that was loaded.
  struct Products {
    float s[4], dp[4], x[4], g[4];
  };
  // dP less D; in the first pass S less the log-sum-exp, otherwise G less t.
  template <bool First>
  NATTEN_EXT_DEVICE void find_products(Products& products, const Staged& staged, int row, const Columns& columns) const {
    if constexpr (First) frame_products_from(products.s, of_scores, query, staged.keys, row, columns);
    frame_products_from(products.dp, of_products, grad_output, staged.values, row, columns);
    frame_products(products.x, cot_query, staged.keys, row, columns, query, staged.cot_keys);
    if constexpr (!First && kStartsAtT) frame_products_from(products.g, of_g, grad_output, staged.cot_values, row, columns);
    else frame_products(products.g, grad_output, staged.cot_values, row, columns);
  }

  // Sums over the keys of a query: of P, and of P times dP - D, X, both, and G.
  struct RowSums {
    float of[5][2];
    NATTEN_EXT_DEVICE RowSums() {
      NATTEN_EXT_UNROLL
      for (int i = 0; i < 10; ++i) of[i / 2][i % 2] = 0;
    }
    NATTEN_EXT_DEVICE void add(int h, float weight, float difference, float x, float g) {
      const float weighted = weight * difference;
      of[0][h] += weight;
      of[1][h] += weighted;
      of[2][h] = fused_multiply_add(weight, x, of[2][h]);
      of[3][h] = fused_multiply_add(weighted, x, of[3][h]);
      of[4][h] = fused_multiply_add(weight, g, of[4][h]);
    }
  };
  // What they make of r and t, and of D, which lacks what dO * O lost by rounding. Weights sum to 1 up to roundings only, which
  // large X would show.
  NATTEN_EXT_DEVICE void find_numbers(RowSums& sums) {
    NATTEN_EXT_UNROLL
    for (auto& sum : sums.of) add_over_columns(sum);
    const auto& [mass, of_difference, of_x, of_both, of_g] = sums.of;
    float minus_t[2];
    NATTEN_EXT_UNROLL
    for (int h = 0; h < 2; ++h) {
      const float inverse = mass[h] == 0 ? 0 : reciprocal(mass[h]);
      r[h] = of_x[h] * inverse;
      minus_t[h] = -(of_g[h] + fused_multiply_add(-of_difference[h], r[h], of_both[h])) * inverse;
    }
    if constexpr (kStartsAtT) {
      Queries::start(this->of_g, minus_t[0], minus_t[1]);
    } else {
      NATTEN_EXT_UNROLL
      for (int e = 0; e < 4; ++e) this->of_g[e] = minus_t[e / 2];
    }
    Queries::start(of_products, of_products[0] - (of_difference[0] - y[0]), of_products[2] - (of_difference[1] - y[1]));
  }

  NATTEN_EXT_DEVICE void clear_all() {
    grad_query.clear_all();
    grad_grad_output.clear_all();
    first.clear_all();
  }

  // False: the sums are not finite, and nothing else was done.
  NATTEN_EXT_DEVICE bool attend(const NarrowParams& p, const Group& group, const Columns& columns, Table& table) {
    constexpr int kAtATime = Rows::kRowsAtATime;
    float weights[kRows][4];
    RowSums sums;
    float lower[2] = {-kInfinity<float>, -kInfinity<float>};  // entries for the lower queries
    if (!group.lower) columns.load_entries(lower, 0);
    Staged staged(group.frame);
    NATTEN_EXT_UNROLL
    for (int row = 0; row < kRows; ++row) {
      NATTEN_EXT_UNROLL
      for (int e = 0; e < 4; ++e) weights[row][e] = 0;
      if (row == kNarrowKernel && !group.lower) continue;
      if (row % kAtATime == 0) staged.load(row);
      float upper[2] = {0, 0};
      if (row < kNarrowKernel) columns.load_entries(upper, row + 1);
      Products products;
      find_products<true>(products, staged, row % kAtATime, columns);
      NATTEN_EXT_UNROLL
      for (int e = 0; e < 4; ++e) {
        const int h = e / 2, c = e % 2;
        if (!Group::may_have(row, h)) continue;
        weights[row][e] = power_of_two(fused_multiply_add(products.s[e], p.factor, h ? lower[c] : upper[c]));
        sums.add(h, weights[row][e], products.dp[e], products.x[e] * p.scale, products.g[e]);
      }
      lower[0] = upper[0], lower[1] = upper[1];
      if (row % kTogether == kTogether - 1 && never(weights[row][2])) return false;
    }
    if (any_in_warp(!all_finite(sums.of))) return false;
    find_numbers(sums);

    clear_all();
    FrameSums<M, Tile, false> others;
    Results key_rows(Tile::kKeys, group.frame), cot_key_rows(Places::kCotKeys, group.frame);
    Results value_rows(Tile::kValues, group.frame), cot_value_rows(Places::kCotValues, group.frame);
    NATTEN_EXT_UNROLL
    for (int row = 0; row < kRows; ++row) {
      if (row == kNarrowKernel && !group.lower) continue;
      if (row % kAtATime == 0) staged.load(row);
      Products products;
      find_products<false>(products, staged, row % kAtATime, columns);
      float sb[4] = {0, 0, 0, 0}, ds[4] = {0, 0, 0, 0}, deviations[4] = {0, 0, 0, 0};
      NATTEN_EXT_UNROLL
      for (int e = 0; e < 4; ++e) {
        const int h = e / 2, c = e % 2;
        if (!Group::may_have(row, h)) continue;
        const float weight = weights[row][e], difference = products.dp[e];
        const float deviation = fused_multiply_add(products.x[e], p.scale, -r[h]);
        sb[e] = columns.valid[c] ? weight * fused_multiply_add(deviation, difference, kStartsAtT ? products.g[e] : products.g[e] + of_g[e]) : 0;
        if (row == 0 && h == 1 && group.lower) sb[e] = 0;
        ds[e] = weight * difference;
        deviations[e] = weight * deviation;
        table.own[row + 1 - h][c] += sb[e];
      }
      grad_query.add(key_rows, row, sb, columns);
      first.add_to(grad_query.acc, cot_key_rows, row, ds, columns);
      grad_grad_output.add(value_rows, row, deviations, columns);
      others.add_to(grad_grad_output.acc, cot_value_rows, row, weights[row], columns);
      if (row % kTogether == kTogether - 1 && never(weights[row][2])) return false;
    }
    return true;
  }

  // All of it in ordinary arithmetic that leaves out what no query attends.
  NATTEN_EXT_DEVICE void attend_carefully(const NarrowParams& p, const Tile& tile, const Group& group, const Columns& columns, bool) {
    const uint32_t g = narrow_lane() / 4;
    const typename Queries::LogSum log_sums[2] = {{p, tile, group, g}, {p, tile, group, g + 8}};
    NATTEN_EXT_UNROLL
    for (float& start : of_scores) start = 0;
    const int rows = kNarrowKernel + (group.lower ? 1 : 0);
    Staged staged(group.frame, true);
    RowSums sums;
    clear_all();
    FrameSums<M, Tile, false> others;
    NATTEN_EXT_NO_UNROLL
    for (int i = 0; i < 2 * rows; ++i) {
      const int row = i < rows ? i : i - rows;
      if (i == rows) find_numbers(sums);
      Products products;
      float weights[4];
      staged.load(row);
      find_products<true>(products, staged, 0, columns);
      NATTEN_EXT_UNROLL
      for (int e = 0; e < 4; ++e) {
        const int h = e / 2;
        const bool exists = columns.valid[e % 2] && group.has(row, h);
        const float entry = exists ? load_shared<float>(columns.entry(e % 2, row, h)) : 0;
        const float score = fused_multiply_add(products.s[e], p.factor, entry);
        const float weight = weight_of(score, log_sums[h].base, log_sums[h].log_sum), difference = products.dp[e];
        if (i < rows) {
          if (exists) sums.add(h, weight, difference, products.x[e] * p.scale, products.g[e]);
          continue;
        }
        const float deviation = fused_multiply_add(products.x[e], p.scale, -r[h]);
        const float gradient = product_of(weight, fused_multiply_add(deviation, difference, products.g[e] + of_g[e]));
        products.s[e] = exists ? gradient : kMasked<float>;
        products.dp[e] = exists ? product_of(weight, difference) : kMasked<float>;
        products.x[e] = exists ? product_of(weight, deviation) : kMasked<float>;
        weights[e] = exists ? weight : kMasked<float>;
      }
      if (i < rows) continue;
      Table::add_valid(products.s, columns, row);
      const auto slot_of = [&](int column) { return group.frame + row * Tile::kColumns + columns.frame_column(column); };
      grad_query.add_valid(Tile::kKeys, products.s, slot_of);
      first.add_valid_to(grad_query.acc, Places::kCotKeys, products.dp, slot_of);
      grad_grad_output.add_valid(Tile::kValues, products.x, slot_of);
      others.add_valid_to(grad_grad_output.acc, Places::kCotValues, weights, slot_of);
    }
  }

  NATTEN_EXT_DEVICE void write(const NarrowParams& p, const Tile& tile, const Group& group) {
    // Rows of Sb and of P (X - r) sum to zero, those of dS to y.
    float y[2];
    Queries::load_y(y, p, tile, group);
    Queries::subtract_keys(grad_query.acc, {grad_query.totals[0], grad_query.totals[2]}, Tile::kKeys, group);
    Queries::subtract_keys(grad_query.acc, {first.totals[0] - y[0], first.totals[2] - y[1]}, Places::kCotKeys, group);
    Queries::subtract_keys(grad_grad_output.acc, {grad_grad_output.totals[0], grad_grad_output.totals[2]}, Tile::kValues, group);
    if (p.grad_query.data != nullptr) {
      group.template write<Element>(grad_query.acc, {p.scale, p.scale}, p, tile, p.grad_query, Queries::result_slot());
    }
    if (p.grad_grad_output.data != nullptr) {
      group.template write<Element>(grad_grad_output.acc, {1, 1}, p, tile, p.grad_grad_output, Queries::result_slot());
    }
    // Of each four lanes, 0 and 1 write the first half of the numbers of query row 0 and 1, and 2 and 3 the second.
    const uint32_t lane = narrow_lane(), h = lane % 2, query = lane / 4 + 8 * h;
    if (!group.owns(query)) return;
    const bool is_second = lane % 4 >= 2;
    const float of_r = h ? r[1] : r[0], of_product = h ? of_products[2] : of_products[0], minus_t = h ? of_g[2] : of_g[0];
    const uint64_t row = group.row_index(p, tile, query);
    // Computed again, which saves registers.
    const typename Queries::LogSum log_sum(p, row);
    const float of_score = start_of_scores(p, log_sum.base, log_sum.log_sum), of_x = -of_r * p.inverse_factor * kLog2E<float>;
    Queries::store_numbers(p, 2 * row + (is_second ? 1 : 0), is_second ? of_x : of_score, is_second ? minus_t : of_product, [&] {
      return is_second ? NumberParts<Element>::exactly(of_r, -minus_t, 0)
                       : NumberParts<Element>::exactly(log_sum.base, log_sum.log_sum, -of_product);
    });
    if (p.grad_grad_lse != nullptr && is_second) store_global(static_cast<float*>(p.grad_grad_lse) + row, of_r);
  }
};

template <class M>
std::vector<HeadRange> narrow_double_backward_query(const Params& p, const std::vector<Window>& windows, Context& context) {
  if (!narrow_double_backward_takes(p)) return {{0, p.heads}};
  return launch_narrow<M, NarrowDoubleBackwardQuery>(p, windows, context, NarrowDims<M>{});
}

template std::vector<HeadRange> narrow_double_backward_query<NATTEN_EXT_MODE>(const Params&, const std::vector<Window>&, Context&);

}  // namespace natten_ext::cuda
