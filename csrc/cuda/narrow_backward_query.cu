// Backward of windows of 7 x 7 keys, the query-centred side (narrow.h): gradients of queries and of the table, and the numbers
// of each row for the key-centred kernel. backward.cu says what corrects D.
#include "narrow_launch.h"

namespace natten_ext::cuda {

// Sums of a warp's table gradients. A lane sums those of its own pairs in registers, as long as these have the same offsets
// from their queries in group after group, which they have away from borders.
// They lie in shared memory behind `kOwnBytes` of own rows.
template <int Dim, bool Whole, uint32_t kOwnBytes>
struct NarrowTableSums {
  using Tile = NarrowTile<Dim, Whole>;
  static constexpr int kExtent = 2 * kNarrowKernel - 1, kEntries = kExtent * Tile::kTableRow;
  static constexpr uint32_t kBytes = kEntries * sizeof(float);  // of a warp
  static constexpr Shared kSums = Tile::kOwn + kOwnBytes;
  static constexpr int kNothing = -1;

  // Which entries the lane's own sums belong to, or kNothing. Three numbers in one: the table's row for lower queries in frame
  // row 0; from the query to its window, how many keys less than kNarrowKernel - 1 to the left; the frame's column there.
  int place = kNothing;
  float own[kNarrowKernel + 1][2];  // of rows as FrameColumns::load_entries has them

  // A barrier must follow.
  NATTEN_EXT_DEVICE NarrowTableSums() {
    for (int i = narrow_lane(); i < kEntries; i += kWarp) store_shared(at(i), 0.0f);
    NATTEN_EXT_UNROLL
    for (float(&of_row)[2] : own) of_row[0] = of_row[1] = 0;
  }

  // Begins a group, whose gradients go to `own`.
  NATTEN_EXT_DEVICE void begin(const NarrowGroup<Dim, Whole>& group, const FrameColumns<Dim, Whole>& columns) {
    const int row = group.window_y - group.y + kNarrowKernel - 2;
    const int next = (row << 8) + ((columns.shift + kNarrowKernel - 1) << 4) + columns.first;
    if (!any_in_warp(next != place)) return;
    if (any_in_warp(place != kNothing)) flush();
    place = next;
  }

  // Adds the lanes' sums to those of the warp: lane e (and e + 16) has entry e of each row, from queries 0 to 3 (4 to 7).
  NATTEN_EXT_DEVICE void flush() {
    const int entry = narrow_lane() % 16, query = narrow_lane() / 16 * 4;
    int from[4];
    bool odd[4], exists[4];
    NATTEN_EXT_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int of_query = shuffle(place, 4 * (query + i));
      const int offset = entry - (of_query >> 4 & 15);  // in the window
      const int column = (of_query + offset) & 7;
      exists[i] = inside(offset, kNarrowKernel);
      from[i] = 4 * (query + i) + column / 2, odd[i] = column % 2 != 0;
    }
    NATTEN_EXT_UNROLL
    for (int r = 0; r <= kNarrowKernel; ++r) {
      float sum = 0;
      NATTEN_EXT_UNROLL
      for (int i = 0; i < 4; ++i) {
        const float even_value = shuffle(own[r][0], from[i]), odd_value = shuffle(own[r][1], from[i]);
        if (exists[i]) sum += odd[i] ? odd_value : even_value;
      }
      sum += shuffle_xor(sum, 16);
      if (narrow_lane() < kExtent) {
        const Shared to = at(((place >> 8) + r) * Tile::kTableRow + entry);
        store_shared(to, load_shared<float>(to) + sum);
      }
      own[r][0] = own[r][1] = 0;
    }
  }

  // At the end of the block.
  NATTEN_EXT_DEVICE static void write(const NarrowParams& p) {
    sync_block();
    const int size = p.table_rows * p.table_columns;
    auto* to = static_cast<float*>(p.table_partials) + (int64_t{narrow_block_of_head(p)} * p.launch_heads + narrow_launch_head(p)) * size;
    for (int i = thread_index(); i < size; i += kNarrowWarps * kWarp) {
      const int y = i / p.table_columns, x = i - y * p.table_columns;
      const int row = y - p.table_rows / 2 + kNarrowKernel - 1, column = x - p.table_columns / 2 + kNarrowKernel - 1;
      float sum = 0;
      for (int warp = 0; warp < kNarrowWarps; ++warp) {
        if (!inside(row, kExtent) || !inside(column, kExtent)) break;
        sum += load_shared<float>(kSums + warp * kBytes + (row * Tile::kTableRow + column) * static_cast<Shared>(sizeof(float)));
      }
      store_global(to + i, sum);
    }
  }

 private:
  NATTEN_EXT_DEVICE static Shared at(int entry) {
    return kSums + narrow_thread() / kWarp * kBytes + entry * static_cast<Shared>(sizeof(float));
  }
};

template <class M, int Dim, bool Whole>
struct NarrowBackwardQuery {
  using Element = typename M::Element;
  using Tile = NarrowTile<Dim, Whole>;
  using Group = NarrowGroup<Dim, Whole>;
  using Columns = FrameColumns<Dim, Whole>;
  using Rows = FrameScores<Dim, Whole>;
  static constexpr int kRows = Group::kFrameRows;
  // On a multiprocessor; of 32 channels, those with compute capability 8 have no shared memory for two.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  static constexpr int kBlocksAtATime = Dim == 32 ? 1 : 2;
#else
  static constexpr int kBlocksAtATime = 2;
#endif
  // A warp's own rows: of queries, grad_output and output, of one group at a time.
  using Table = NarrowTableSums<Dim, Whole, kNarrowWarps * 3 * kWarpRows * Tile::kBytes>;
  static constexpr uint32_t kShared = Table::kSums + kNarrowWarps * Table::kBytes;
  static constexpr bool kTableGradient = true;

  NarrowLeft<M, Dim> query, grad_output;
  FrameSums<M, Dim, Whole, true> results;
  float base[2], log_sum[2], d[2];

  NATTEN_EXT_DEVICE static uint32_t own_slot(int tensor) { return (narrow_thread() / kWarp * 3 + tensor) * kWarpRows; }

  NATTEN_EXT_DEVICE static void run(const NarrowParams& p) {
    const int head = p.head[narrow_launch_head(p)];
    fill_narrow_table<Element, Tile>(p, head);
    Table table;
    for (int index = narrow_block_of_head(p); index < p.tiles; index += p.blocks_per_head) {
      const Tile tile(p, forget(head), index);
      if (!tile.exists) continue;
      sync_block();  // shared memory is free again
      stage_narrow_keys(p, tile);
      NATTEN_EXT_NO_UNROLL
      for (int i = 0; i < Tile::kGroups; ++i) {
        const Group group(p, tile, i);
        if (!group.empty()) {
          group.stage(p, tile, p.query, own_slot(0), true);
          group.stage(p, tile, p.grad_output, own_slot(1), true);
          group.stage(p, tile, p.output, own_slot(2), true);
        }
        copy_async_commit();
        copy_async_wait<0>();
        if (i == 0) sync_block();
        else sync_warp();
        if (group.empty()) continue;
        const Columns columns(group);
        NarrowBackwardQuery gradients;
        gradients.load(p, tile, group);
        table.begin(group, columns);
        gradients.attend(p.scale * kLog2E<float>, group, columns, table);
        // Computed again, which saves registers.
        const Tile again(p, head, forget(index));
        const Group same(p, again, forget(i));
        // Zero times NaN is NaN: as in `with_care`.
        if (any_in_warp(!all_finite(gradients.results.acc))) gradients.attend_carefully(p.scale * kLog2E<float>, same, Columns(same));
        gradients.write(p, again, same);
      }
    }
    if (any_in_warp(table.place != Table::kNothing)) table.flush();
    if (p.table_partials != nullptr) Table::write(p);
  }

  NATTEN_EXT_DEVICE void load(const NarrowParams& p, const Tile& tile, const Group& group) {
    query.template load<Tile>(own_slot(0));
    grad_output.template load<Tile>(own_slot(1));
    const uint32_t g = narrow_lane() / 4;
    NATTEN_EXT_UNROLL
    for (int h = 0; h < 2; ++h) {
      // Another group's queries have no weights: in the table's gradient they count once.
      base[h] = kInfinity<float>;
      log_sum[h] = 0;
      if (!group.owns(g + 8 * h)) continue;
      const uint64_t row = group.row_index(p, tile, g + 8 * h);
      base[h] = load_global(static_cast<const float*>(p.base) + row);
      log_sum[h] = load_global(static_cast<const float*>(p.log_sum) + row);
    }
    load_d();
    float y[2];
    load_y(y, p, tile, group);
    d[0] -= y[0], d[1] -= y[1];
  }

  NATTEN_EXT_DEVICE static void load_y(float (&y)[2], const NarrowParams& p, const Tile& tile, const Group& group) {
    const uint32_t g = narrow_lane() / 4;
    NATTEN_EXT_UNROLL
    for (int h = 0; h < 2; ++h) {
      y[h] = 0;
      if (p.grad_lse == nullptr || !group.owns(g + 8 * h)) continue;
      y[h] = load_global(static_cast<const float*>(p.grad_lse) + group.row_index(p, tile, g + 8 * h));
    }
  }

  // Products of rows of grad_output and output, formed as dP is: the diagonals of two blocks.
  NATTEN_EXT_DEVICE void load_d() {
    const uint32_t lane = narrow_lane(), g = lane / 4, matrix = lane / 8;
    float c[2][4];
    clear(c);
    NATTEN_EXT_UNROLL
    for (int b = 0; b < 2; ++b) {
      const Shared row = Tile::kOwn + Tile::place(own_slot(2) + 8 * b + lane % 8, matrix % (Dim / 8));
      uint32_t words[4];
      load_matrices(words, row);
      grad_output.multiply_rows(c[b], [&](int chunk) { return words[chunk]; });
    }
    NATTEN_EXT_UNROLL
    for (int h = 0; h < 2; ++h) d[h] = shuffle(g % 2 ? c[h][2 * h + 1] : c[h][2 * h], 4 * g + g / 2);
  }

  NATTEN_EXT_DEVICE void attend(float factor, const Group& group, const Columns& columns, Table& table) {
    float lower[2] = {-kInfinity<float>, -kInfinity<float>};  // entries for the lower queries
    if (!group.lower) columns.load_entries(lower, 0);
    Rows keys(Tile::kKeys, group.frame), values(Tile::kValues, group.frame);
    FrameResults<Dim, Whole> key_rows(Tile::kKeys, group.frame);
    results.clear_all();
    NATTEN_EXT_UNROLL
    for (int r = 0; r < kRows; ++r) {
      if (r == kNarrowKernel && !group.lower) continue;
      if (r % Rows::kRowsAtATime == 0) {
        keys.load(r);
        values.load(r);
      }
      float s[4], dp[4], ds[4] = {0, 0, 0, 0}, upper[2] = {0, 0};
      if (r < kNarrowKernel) columns.load_entries(upper, r + 1);
      frame_products(s, query, keys, r % Rows::kRowsAtATime, columns);
      frame_products(dp, grad_output, values, r % Rows::kRowsAtATime, columns);
      NATTEN_EXT_UNROLL
      for (int e = 0; e < 4; ++e) {
        const int h = e / 2, c = e % 2;
        if (!Group::may_have(r, h)) continue;
        const float weight = weight_of(fused_multiply_add(s[e], factor, h ? lower[c] : upper[c]), base[h], log_sum[h]);
        ds[e] = columns.valid[c] ? weight * (dp[e] - d[h]) : 0;
        if (r == 0 && h == 1 && group.lower) ds[e] = 0;
        table.own[r + 1 - h][c] += ds[e];
      }
      lower[0] = upper[0], lower[1] = upper[1];
      results.add(key_rows, r, ds, columns);
      hold_back_loads();
    }
  }

  // All of it in ordinary arithmetic that leaves out what no query attends; but for the table's gradient, which has nothing else.
  NATTEN_EXT_DEVICE void attend_carefully(float factor, const Group& group, const Columns& columns) {
    results.clear_all();
    Rows keys(Tile::kKeys, group.frame), values(Tile::kValues, group.frame);
    NATTEN_EXT_NO_UNROLL
    for (int r = 0; r < kNarrowKernel + (group.lower ? 1 : 0); ++r) {
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
        const float weight = weight_of(fused_multiply_add(s[e], factor, entry), base[h], log_sum[h]);
        s[e] = exists ? product_of(weight, dp[e] - d[h]) : kMasked<float>;
      }
      results.add_valid(Tile::kKeys, s, [&](int column) { return group.frame + r * Tile::kColumns + columns.frame_column(column); });
    }
  }

  NATTEN_EXT_DEVICE void write(const NarrowParams& p, const Tile& tile, const Group& group) {
    const uint32_t lane = narrow_lane(), g = lane / 4, t = lane % 4;
    // Rows of dS sum to y. What is left over is what D lacks, and roundings.
    float y[2];
    load_y(y, p, tile, group);
    const float lacking[2] = {results.totals[0] - y[0], results.totals[2] - y[1]};
    NATTEN_EXT_UNROLL
    for (int h = 0; h < 2; ++h) {
      const Shared row = Tile::kKeys + Tile::place(group.own_key + h * Tile::kColumns + g, 0) + 4 * t;
      NATTEN_EXT_UNROLL
      for (int n = 0; n < Dim / 8; ++n) {
        struct alignas(4) Pair {
          Element e[2];
        };
        const Pair pair = load_shared<Pair>(row ^ 16 * n);
        NATTEN_EXT_UNROLL
        for (int e = 0; e < 2; ++e) {
          results.acc[n][2 * h + e] = fused_multiply_add(-lacking[h], widen(pair.e[e]), results.acc[n][2 * h + e]);
        }
      }
    }
    if (p.grad_query.data != nullptr) group.template write<Element>(results.acc, {p.scale, p.scale}, p, tile, p.grad_query, own_slot(0));
    else sync_warp();  // the next group's rows come to where this one's are
    if (t >= 2 || !group.owns(g + 8 * t)) return;
    NumberChunk<float> numbers;
    NATTEN_EXT_UNROLL
    for (int i = 0; i < 4; ++i) numbers.numbers[i] = 0;
    numbers.numbers[kBase] = t ? base[1] : base[0];
    numbers.numbers[kLogSum] = t ? log_sum[1] : log_sum[0];
    numbers.numbers[kD] = t ? d[1] + lacking[1] : d[0] + lacking[0];
    store_global(reinterpret_cast<NumberChunk<float>*>(p.row_numbers.data) + group.row_index(p, tile, g + 8 * t), numbers);
  }
};

template <class M>
std::vector<HeadRange> narrow_backward_query(const Params& p, const std::vector<Window>& windows, Context& context) {
  return launch_narrow<M, NarrowBackwardQuery>(p, windows, context, NarrowDims<M>{});
}

template std::vector<HeadRange> narrow_backward_query<NATTEN_EXT_MODE>(const Params&, const std::vector<Window>&, Context&);

}  // namespace natten_ext::cuda
