// Forward of grids of 16 x 16 windows (grid.h). A warp forms the scores of a group with some rows of keys, up to half a window:
// first it takes the largest, then exponentials, sums and the product with the values. Results so far are scaled to the new base.
#include "grid_launch.h"

namespace natten_ext::cuda {

template <class M, int Dim>
struct GridForward {
  using Element = typename M::Element;
  using Tile = GridTile<Dim, Dim <= 32 ? 4 : Dim <= 64 ? 8 : 16>;
  using Group = GridGroup<Tile>;
  using Entries = GridEntries<Tile>;
  static constexpr int kRows = Dim <= 16 ? 8 : Dim <= 32 ? 4 : Dim <= 80 ? 2 : 1;  // of keys, whose scores are in registers at a time
  static constexpr int kBlocksAtATime = Dim <= 16 ? 4 : Dim <= 32 ? 3 : Dim <= 64 ? 2 : 1;  // on a multiprocessor
  static constexpr Shared kTable = Tile::kOwn + Tile::kRegion;
  static constexpr uint32_t kShared = kTable + Tile::kTableBytes;
  static constexpr bool kTableGradient = false;
  static constexpr int kRowNumbers = 0;

  NarrowLeft<M, Tile> query;
  FrameSums<M, Tile, false> results;
  float base[2] = {-kInfinity<float>, -kInfinity<float>}, sum[2] = {0, 0};

  NATTEN_EXT_DEVICE static void run(const NarrowParams& p) {
    const int head = p.head[narrow_launch_head(p)];
    fill_grid_table<Element, Tile>(p, head, kTable);
    for (int index = narrow_block_of_head(p); index < p.tiles; index += p.blocks_per_head) {
      const GridWindow window(p, head, index);
      sync_block();  // shared memory is free again
      stage_grid_window<Tile>(p, window, {&p.query, &p.key, &p.value}, {Tile::kQueries, Tile::kKeys, Tile::kValues});
      copy_async_commit();
      copy_async_wait<0>();
      sync_block();
      NATTEN_EXT_NO_UNROLL
      for (int i = 0; i < Tile::kGroups; ++i) {
        const Group group = Group::template of_warp<Tile::kWarps>(narrow_thread() / kWarp, i);
        GridForward attended;
        attended.attend(p, group);
        attended.write(p, window, group);
      }
    }
  }

  NATTEN_EXT_DEVICE void attend(const NarrowParams& p, const Group& group) {
    FrameScores<Tile> keys(Tile::kKeys, 0);
    FrameResults<Tile> values(Tile::kValues, 0);
    Entries entries(group, kTable);
    typename Entries::Pair upper[2], lower[2];
    entries.load(lower, -1);
    results.clear_all();
    query.load_from(Tile::kQueries + group.left_place());
    NATTEN_EXT_NO_UNROLL
    for (int first = 0; first < kGridWindow; first += kRows) {
      float s[kRows][2][4], largest[2] = {base[0], base[1]};
      NATTEN_EXT_UNROLL
      for (int r = 0; r < kRows; ++r) {
        if (r % keys.kRowsAtATime == 0) keys.load(r);
        entries.load(upper, r);
        clear(s[r]);
        add_frame_products(s[r], query, keys, r % keys.kRowsAtATime);
        NATTEN_EXT_UNROLL
        for (int e = 0; e < 8; ++e) {
          const int b = e / 4, h = e / 2 % 2;
          float& score = s[r][b][e % 4];
          score = fused_multiply_add(score, p.factor, h ? lower[b].e[e % 2] : upper[b].e[e % 2]);
          largest[h] = larger(largest[h], score);
        }
        NATTEN_EXT_UNROLL
        for (int b = 0; b < 2; ++b) lower[b] = upper[b];
      }
      raise_base(largest);
      NATTEN_EXT_UNROLL
      for (int r = 0; r < kRows; ++r) {
        NATTEN_EXT_UNROLL
        for (int e = 0; e < 8; ++e) {
          float& weight = s[r][e / 4][e % 4];
          weight = power_of_two(weight - largest[e / 2 % 2]);
          sum[e / 2 % 2] += weight;
        }
        if (r % values.kProductsAtATime == 0) values.load(r);
        results.add_blocks(values, r, s[r]);
      }
      keys.address += kRows * Tile::kRowBytes, values.address += kRows * Tile::kRowBytes, entries.address += kRows * Tile::kTableRow;
    }
    add_over_columns(sum);
  }

  // The largest of each row becomes its base, and what is taken off scores: 0 for rows without any.
  NATTEN_EXT_DEVICE void raise_base(float (&largest)[2]) {
    NATTEN_EXT_UNROLL
    for (int h = 0; h < 2; ++h) {
      largest[h] = larger(largest[h], shuffle_xor(largest[h], 1));
      largest[h] = larger(largest[h], shuffle_xor(largest[h], 2));
      const float before = base[h];
      base[h] = largest[h];
      if (largest[h] == -kInfinity<float>) largest[h] = 0;
      const float factor = power_of_two(before - largest[h]);
      sum[h] *= factor;
      NATTEN_EXT_UNROLL
      for (float(&acc)[4] : results.acc) acc[2 * h] *= factor, acc[2 * h + 1] *= factor;
    }
  }

  NATTEN_EXT_DEVICE void write(const NarrowParams& p, const GridWindow& window, const Group& group) const {
    group.template write<Element>(results.acc, {reciprocal(sum[0]), reciprocal(sum[1])}, p, window, p.output, Tile::kQueries);
    // Of each four lanes, 0 and 1 write the base of query row 0 and 1, and 2 and 3 the logarithm of its sum.
    const uint32_t lane = narrow_lane(), h = lane % 2;
    const bool is_base = lane % 4 < 2;
    const float log_sum = quick_logarithm(h ? sum[1] : sum[0]), row_base = h ? base[1] : base[0];
    const uint64_t row = window.row_index(p, group.y + h, group.x + lane / 4);
    store_global(static_cast<float*>(is_base ? p.base : p.log_sum) + row, is_base ? row_base : log_sum);
    if (p.natural_lse != nullptr && is_base) {
      store_global(static_cast<float*>(p.natural_lse) + row, (row_base + log_sum) / kLog2E<float>);
    }
  }
};

template <class M>
bool grid_forward(const Params& p, const std::vector<Window>& windows, Context& context) {
  return launch_grid<M, GridForward>(p, windows, context, GridDims<M>{});
}

template bool grid_forward<NATTEN_EXT_MODE>(const Params&, const std::vector<Window>&, Context&);

}  // namespace natten_ext::cuda
