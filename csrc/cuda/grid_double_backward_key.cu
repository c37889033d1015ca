// Double backward of grids of 16 x 16 windows, the key-centred side (grid_double.h): gradients of keys, values and the table, from
// the numbers of queries that the query-centred kernel leaves.
#include "grid_double.h"
#include "grid_launch.h"

namespace natten_ext::cuda {

template <class M, int Dim>
struct GridDoubleBackwardKey {
  using Element = typename M::Element;
  using Tile = PitchedTile<Dim>;
  using Own = OwnRow<M, Dim>;
  using Row = StagedRow<M, Tile>;
  using Entries = RowEntries<Tile, true>;
  using Gradient = float[Tile::kChunks][4];
  static constexpr int kBlocksAtATime = Dim <= 16 ? 2 : 1;  // on a multiprocessor
  static constexpr Shared kQueries = 0, kGradOutputs = Tile::kRegion, kCotQueries = 2 * Tile::kRegion;
  static constexpr Shared kTable = 3 * Tile::kRegion;
  // Numbers of queries, an array for each: the two parts of the log-sum-exp, D, r and t.
  static constexpr int kNumberCount = 5;
  static constexpr Shared kNumbers = kTable + Tile::kTableBytes, kNumberBytes = Tile::kSlots * sizeof(float);
  // A warp's sums of the table's gradient. A row has room for an offset that no pair has.
  static constexpr Shared kSums = kNumbers + kNumberCount * kNumberBytes, kSumRow = 2 * kGridWindow * sizeof(float);
  static constexpr Shared kSumBytes = Tile::kTableExtent * kSumRow;
  static constexpr uint32_t kShared = kSums + Tile::kWarps * kSumBytes;
  static constexpr bool kTableGradient = true;
  static constexpr int kRowNumbers = 8;

  Own key, value, cot_key, cot_value;
  Gradient grad_key, grad_value;

  NATTEN_EXT_DEVICE static void run(const NarrowParams& p) {
    const int head = p.head[narrow_launch_head(p)];
    fill_grid_table<Element, Tile>(p, head, kTable);
    for (int row = 0; row < Tile::kTableExtent; ++row) store_shared(sum_at(narrow_thread() / kWarp, row, narrow_lane()), 0.0f);
    for (int index = narrow_block_of_head(p); index < p.tiles; index += p.blocks_per_head) {
      const GridWindow window(p, head, index);
      sync_block();  // shared memory is free again
      stage_pitched<Tile>(p, window, {&p.query, &p.grad_output, &p.cot_query});
      stage_numbers(p, window);
      copy_async_commit();
      NATTEN_EXT_NO_UNROLL
      for (int i = 0; i < Tile::kGroups; ++i) {
        const int row = static_cast<int>(narrow_thread() / kWarp) + i * Tile::kWarps;
        GridDoubleBackwardKey gradients;
        gradients.load(p, window, row);
        if (i == 0) {
          copy_async_wait<0>();
          sync_block();
        }
        gradients.attend(p, row);
        if (p.grad_key.data != nullptr) write_row<Element>(gradients.grad_key, p.scale, p, window, p.grad_key, row);
        if (p.grad_value.data != nullptr) write_row<Element>(gradients.grad_value, 1, p, window, p.grad_value, row);
      }
    }
    if (p.table_partials != nullptr) write_table(p);
  }

  // Each thread copies the numbers of a query.
  NATTEN_EXT_DEVICE static void stage_numbers(const NarrowParams& p, const GridWindow& window) {
    static_assert(Tile::kThreads == Tile::kSlots);
    const int slot = thread_index(), y = slot / kGridWindow, x = slot % kGridWindow;
    const uint64_t row = window.row_index(p, y, x);
    const Shared to = kNumbers + slot * static_cast<Shared>(sizeof(float));
    copy_async<4>(to, static_cast<const float*>(p.base) + row, true);
    copy_async<4>(to + kNumberBytes, static_cast<const float*>(p.log_sum) + row, true);
    NATTEN_EXT_UNROLL
    for (int i = 0; i < 3; ++i) {
      copy_async<4>(to + (2 + i) * kNumberBytes, grid_number(p, window, static_cast<GridNumber>(kGridD + i), y, x), true);
    }
  }

  NATTEN_EXT_DEVICE void load(const NarrowParams& p, const GridWindow& window, int row) {
    key.load(p, window, p.key, row);
    value.load(p, window, p.value, row);
    cot_key.load(p, window, p.cot_key, row);
    cot_value.load(p, window, p.cot_value, row);
  }

  NATTEN_EXT_DEVICE void attend(const NarrowParams& p, int own_row) {
    clear(grad_key);
    clear(grad_value);
    Row queries;
    Shared entries_of = Entries::first(own_row, kTable);
    Shared numbers = kNumbers + narrow_lane() % 4 * 8;
    NATTEN_EXT_NO_UNROLL
    for (int i = 0; i < kGridWindow; ++i, queries.advance(), entries_of += Entries::kStep, numbers += kGridWindow * static_cast<Shared>(sizeof(float))) {
      float s[2][4], dp[2][4], x[2][4], g[2][4];  // products of S, dP, X and G
      clear(s);
      clear(dp);
      clear(x);
      clear(g);
      queries.for_each_step(kQueries, [&](int step, int b, uint32_t first, uint32_t second) {
        key.multiply(s[b], step, first, second);
        cot_key.multiply(x[b], step, first, second);
      });
      queries.for_each_step(kCotQueries, [&](int step, int b, uint32_t first, uint32_t second) { key.multiply(x[b], step, first, second); });
      queries.for_each_step(kGradOutputs, [&](int step, int b, uint32_t first, uint32_t second) {
        value.multiply(dp[b], step, first, second);
        cot_value.multiply(g[b], step, first, second);
      });
      const Entries entries(entries_of);
      NATTEN_EXT_UNROLL
      for (int b = 0; b < 2; ++b) {
        struct alignas(8) Pair {
          float e[2];
        };
        Pair of[kNumberCount];
        NATTEN_EXT_UNROLL
        for (int n = 0; n < kNumberCount; ++n) of[n] = load_shared<Pair>(numbers + n * kNumberBytes + 32 * b);
        const auto& [base, log_sum, d, r, t] = of;
        NATTEN_EXT_UNROLL
        for (int e = 0; e < 4; ++e) {
          const int c = e % 2;
          const float weight = weight_of(fused_multiply_add(s[b][e], p.factor, entries.of(b, e)), base.e[c], log_sum.e[c]);
          const float difference = dp[b][e] - d.e[c], deviation = fused_multiply_add(x[b][e], p.scale, -r.e[c]);
          s[b][e] = weight * fused_multiply_add(deviation, difference, g[b][e] - t.e[c]);
          dp[b][e] = weight * difference;
          x[b][e] = weight * deviation;
        }
      }
      uint32_t packed[3][4];
      pack_weights<Element>(packed[0], s);
      pack_weights<Element>(packed[1], dp);
      pack_weights<Element>(packed[2], x);
      if (p.table_partials != nullptr) add_to_table(s, own_row - i);
      queries.accumulate(grad_key, packed[0], kQueries);
      queries.accumulate(grad_key, packed[1], kCotQueries);
      queries.accumulate(grad_value, packed[2], kGradOutputs);
    }
  }

  // ------------------------------------------------------------------------------------------ the table

  NATTEN_EXT_DEVICE static Shared sum_at(uint32_t warp, int row, int column) {
    return kSums + warp * kSumBytes + row * kSumRow + column * static_cast<int>(sizeof(float));
  }
  // Adds the pairs of two rows, the key's `apart` below the query's. Offsets are equal on diagonals, and each lane ends up with the sum of
  // one. A lane of position g has columns c - g of three eights; where that is negative, they are of the eight before. Then lanes give
  // each other half of what they have, three times: bits of g tell which half they keep.
  NATTEN_EXT_DEVICE static void add_to_table(const float (&gradients)[2][4], int apart) {
    const int lane = thread_index() % kWarp, g = lane / 4, t = lane % 4;
    const bool later_half = g / 4 % 2 != 0, later_quarter = g / 2 % 2 != 0;
    float halves[2][2];
    NATTEN_EXT_UNROLL
    for (int e = 0; e < 2; ++e) {
      const float of_eights[3] = {gradients[0][2 + e], gradients[0][e] + gradients[1][2 + e], gradients[1][e]};
      const bool before = 2 * t + e < g;
      const float all[4] = {before ? of_eights[0] : 0, before ? of_eights[1] : of_eights[0], before ? of_eights[2] : of_eights[1],
                            before ? 0 : of_eights[2]};
      NATTEN_EXT_UNROLL
      for (int i = 0; i < 2; ++i) {
        halves[i][e] = (later_half ? all[2 + i] : all[i]) + shuffle_xor(later_half ? all[i] : all[2 + i], 16 + 2);
      }
    }
    float sums[2];
    NATTEN_EXT_UNROLL
    for (int e = 0; e < 2; ++e) {
      sums[e] = (later_quarter ? halves[1][e] : halves[0][e]) +
                shuffle(later_quarter ? halves[0][e] : halves[1][e], (lane ^ 8) / 4 * 4 + (later_quarter ? t + 3 : t + 1) % 4);
    }
    const float sum = sums[0] + shuffle(sums[1], (lane ^ 4) / 4 * 4 + (g % 2 != 0 ? t + 3 : t) % 4);
    // The offset of queries from keys, from -16 to 15.
    const int right = (2 * t - g & 7) + 8 * (later_half * 2 + later_quarter) - kGridWindow;
    const Shared to = sum_at(narrow_thread() / kWarp, apart + kGridWindow - 1, kGridWindow - 1 - right);
    store_shared(to, load_shared<float>(to) + sum);
  }

  // At the end of the block.
  NATTEN_EXT_DEVICE static void write_table(const NarrowParams& p) {
    constexpr int kExtent = Tile::kTableExtent;
    sync_block();
    auto* to = static_cast<float*>(p.table_partials) + (int64_t{narrow_block_of_head(p)} * p.launch_heads + narrow_launch_head(p)) * kExtent * kExtent;
    for (int i = thread_index(); i < kExtent * kExtent; i += Tile::kThreads) {
      float sum = 0;
      NATTEN_EXT_UNROLL
      for (uint32_t warp = 0; warp < Tile::kWarps; ++warp) sum += load_shared<float>(sum_at(warp, i / kExtent, i % kExtent));
      store_global(to + i, sum);
    }
  }
};

template <class M>
bool grid_double_backward_key(const Params& p, const std::vector<Window>& windows, Context& context) {
  return launch_grid<M, GridDoubleBackwardKey>(p, windows, context, GridDoubleBackwardDims<M>{});
}
template <class M>
bool grid_double_backward_key_takes(const Params& p, const std::vector<Window>& windows, const Context& context) {
  return grid_takes<M, GridDoubleBackwardKey>(p, windows, context, GridDoubleBackwardDims<M>{});
}

template bool grid_double_backward_key<NATTEN_EXT_MODE>(const Params&, const std::vector<Window>&, Context&);
template bool grid_double_backward_key_takes<NATTEN_EXT_MODE>(const Params&, const std::vector<Window>&, const Context&);

}  // namespace natten_ext::cuda
