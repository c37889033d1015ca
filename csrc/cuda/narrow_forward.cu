// Forward of windows of 7 x 7 keys (narrow.h). A warp forms the scores of a whole frame, takes the largest of each row, and
// only then exponentials and the product with the values.
#include "narrow_launch.h"

namespace natten_ext::cuda {

template <class M, int Dim, bool Whole>
struct NarrowForward {
  using Element = typename M::Element;
  using Tile = NarrowTile<Dim, Whole>;
  using Group = NarrowGroup<Tile>;
  using Columns = FrameColumns<Tile>;
  using Keys = FrameScores<Tile>;
  static constexpr int kRows = Group::kFrameRows;
  static constexpr int kBlocksAtATime = 2;  // on a multiprocessor
  static constexpr uint32_t kShared = Tile::kOwn + Tile::kWarps * Tile::kGroups * kWarpRows * Tile::kBytes;
  static constexpr uint32_t kSharedOfOrder = kShared;
  static constexpr bool kTableGradient = false;
  static constexpr int kRowNumbers = 0;

  NarrowLeft<M, Tile> query;
  FrameSums<M, Tile, false> results;
  float base[2], sum[2];

  NATTEN_EXT_DEVICE static uint32_t own_slot(int i) { return (narrow_thread() / kWarp * Tile::kGroups + i) * kWarpRows; }

  NATTEN_EXT_DEVICE static void run(const NarrowParams& p) {
    const Tile tile(p, p.head[narrow_launch_head(p)], narrow_block_of_head(p));
    if (!tile.exists) return;
    stage_narrow_keys(p, tile);
    NATTEN_EXT_UNROLL
    for (int i = 0; i < Tile::kGroups; ++i) Group(p, tile, i).stage(p, tile, p.query, own_slot(i));
    copy_async_commit();
    fill_narrow_table<Element, Tile>(p, tile.head);
    copy_async_wait<0>();
    sync_block();
    const float factor = p.scale * kLog2E<float>;
    NATTEN_EXT_NO_UNROLL
    for (int i = 0; i < Tile::kGroups; ++i) {
      const Group group(p, tile, i);
      if (group.empty()) continue;
      const Columns columns(group);
      NarrowForward attended;
      attended.query.load(own_slot(i));
      attended.attend(factor, group, columns);
      // Zero times NaN is NaN: as in `with_care`.
      if (any_in_warp(!all_finite(attended.results.acc))) attended.attend_carefully(factor, group, columns);
      attended.write(p, tile, group, own_slot(i));
    }
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
    float lower[2] = {-kInfinity<float>, -kInfinity<float>};  // entries for the lower queries
    if (!group.lower) columns.load_entries(lower, 0);
    float s[kRows][4], largest[2] = {-kInfinity<float>, -kInfinity<float>};
    Keys keys(Tile::kKeys, group.frame);
    NATTEN_EXT_UNROLL
    for (int r = 0; r < kRows; ++r) {
      NATTEN_EXT_UNROLL
      for (int e = 0; e < 4; ++e) s[r][e] = -kInfinity<float>;
      if (r == kNarrowKernel && !group.lower) continue;
      if (r % Keys::kRowsAtATime == 0) keys.load(r);
      float product[4], upper[2] = {0, 0};
      if (r < kNarrowKernel) columns.load_entries(upper, r + 1);
      frame_products(product, query, keys, r % Keys::kRowsAtATime, columns);
      NATTEN_EXT_UNROLL
      for (int e = 0; e < 4; ++e) {
        if (!Group::may_have(r, e / 2)) continue;
        s[r][e] = fused_multiply_add(product[e], factor, e / 2 ? lower[e % 2] : upper[e % 2]);
        largest[e / 2] = larger(largest[e / 2], s[r][e]);
      }
      lower[0] = upper[0], lower[1] = upper[1];
    }
    float from[2];
    find_base(largest, from);
    results.clear_all();
    sum[0] = sum[1] = 0;
    FrameResults<Tile> values(Tile::kValues, group.frame);
    NATTEN_EXT_UNROLL
    for (int r = 0; r < kRows; ++r) {
      if (r == kNarrowKernel && !group.lower) continue;
      float weights[4] = {0, 0, 0, 0};
      NATTEN_EXT_UNROLL
      for (int e = 0; e < 4; ++e) {
        if (!Group::may_have(r, e / 2)) continue;
        weights[e] = power_of_two(s[r][e] - from[e / 2]);
        sum[e / 2] += weights[e];
      }
      results.add(values, r, weights, columns);
    }
    add_over_columns(sum);
  }

  // All of it in ordinary arithmetic that leaves out what no query attends.
  NATTEN_EXT_DEVICE void attend_carefully(float factor, const Group& group, const Columns& columns) {
    const int rows = kNarrowKernel + (group.lower ? 1 : 0);
    float largest[2] = {-kInfinity<float>, -kInfinity<float>}, from[2] = {0, 0};
    results.clear_all();
    sum[0] = sum[1] = 0;
    Keys keys(Tile::kKeys, group.frame, true);
    NATTEN_EXT_NO_UNROLL
    for (int i = 0; i < 2 * rows; ++i) {
      const int r = i < rows ? i : i - rows;
      if (i == rows) find_base(largest, from);
      float s[4];
      keys.load(r);
      frame_products(s, query, keys, 0, columns);
      NATTEN_EXT_UNROLL
      for (int e = 0; e < 4; ++e) {
        const int h = e / 2;
        const bool exists = columns.valid[e % 2] && group.has(r, h);
        s[e] = exists ? fused_multiply_add(s[e], factor, load_shared<float>(columns.entry(e % 2, r, h))) : -kInfinity<float>;
        largest[h] = larger(largest[h], s[e]);
        if (i < rows) continue;
        s[e] = exists ? power_of_two(s[e] - from[h]) : kMasked<float>;
        sum[h] += s[e];
      }
      if (i >= rows) {
        results.add_valid(Tile::kValues, s, [&](int column) { return group.frame + r * Tile::kColumns + columns.frame_column(column); });
      }
    }
    add_over_columns(sum);
  }

  NATTEN_EXT_DEVICE void write(const NarrowParams& p, const Tile& tile, const Group& group, uint32_t slot) const {
    group.template write<Element>(results.acc, {reciprocal(sum[0]), reciprocal(sum[1])}, p, tile, p.output, slot);
    // Of each four lanes, 0 and 1 write the base of query row 0 and 1, and 2 and 3 the logarithm of its sum.
    const uint32_t lane = narrow_lane(), h = lane % 2, query = lane / 4 + 8 * h;
    if (!group.owns(query)) return;
    const bool is_base = lane % 4 < 2;
    const float log_sum = quick_logarithm(h ? sum[1] : sum[0]), row_base = h ? base[1] : base[0];
    const uint64_t row = group.row_index(p, tile, query);
    store_global(static_cast<float*>(is_base ? p.base : p.log_sum) + row, is_base ? row_base : log_sum);
    if (p.natural_lse != nullptr && is_base) {
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
