// What query-centred kernels of narrow windows share (narrow.h): sums of table gradients, numbers of queries, and the loop over a
// block's tiles and groups.
#pragma once

#include "narrow_frame.h"
#include "narrow_numbers.h"

namespace natten_ext::cuda {

// Sums of a warp's table gradients. A lane sums those of its own pairs in registers, as long as these have the same offsets
// from their queries in group after group, which they have away from borders.
// They lie in shared memory from `kSums` on.
template <class Tile, Shared kSums>
struct NarrowTableSums {
  static constexpr int kExtent = 2 * kNarrowKernel - 1, kEntries = kExtent * Tile::kTableRow;
  static constexpr uint32_t kBytes = kEntries * sizeof(float);  // of a warp
  static constexpr Shared kEnd = kSums + Tile::kWarps * kBytes;
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
  NATTEN_EXT_DEVICE void begin(const NarrowGroup<Tile>& group, const FrameColumns<Tile>& columns) {
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

  // Adds the gradients of a frame row's pairs, but those that are marked as masked, to the warp's sums.
  NATTEN_EXT_DEVICE static void add_valid(const float (&gradients)[4], const FrameColumns<Tile>& columns, int row) {
    NATTEN_EXT_NO_UNROLL
    for (uint32_t lane = 0; lane < kWarp; ++lane) {
      sync_warp();
      if (lane != narrow_lane()) continue;
      NATTEN_EXT_UNROLL
      for (int e = 0; e < 4; ++e) {
        if (is_negative_zero(gradients[e])) continue;
        const Shared to = at(0) + columns.entry(e % 2, row, e / 2) - Tile::kTable;
        store_shared(to, load_shared<float>(to) + gradients[e]);
      }
    }
    sync_warp();
  }

  // At the end of the block.
  NATTEN_EXT_DEVICE static void write(const NarrowParams& p) {
    sync_block();
    const int size = p.table_rows * p.table_columns;
    auto* to = static_cast<float*>(p.table_partials) + (int64_t{narrow_block_of_head(p)} * p.launch_heads + narrow_launch_head(p)) * size;
    for (int i = thread_index(); i < size; i += Tile::kThreads) {
      const int y = i / p.table_columns, x = i - y * p.table_columns;
      const int row = y - p.table_rows / 2 + kNarrowKernel - 1, column = x - p.table_columns / 2 + kNarrowKernel - 1;
      float sum = 0;
      for (int warp = 0; warp < Tile::kWarps; ++warp) {
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

// What a lane knows of its two queries of a group, and the order in which a block works. `Tensors`: of own rows, which lie from `Own`
// on in shared memory, for a group of each warp at a time. `Early`: once they are in registers, the next group's are on their way; so
// results leave by room of their own.
template <class M, class TileType, int Tensors, Shared Own, bool Early>
struct NarrowQueries {
  using Element = typename M::Element;
  using Tile = TileType;
  using Group = NarrowGroup<Tile>;
  using Columns = FrameColumns<Tile>;
  using Rows = FrameScores<Tile>;
  using Results = FrameResults<Tile>;
  using Sums = FrameSums<M, Tile, true>;
  static constexpr int kOwnRooms = Tensors + Early;
  using Table = NarrowTableSums<Tile, Own + Tile::kWarps * kOwnRooms * kWarpRows * Tile::kBytes>;
  static constexpr int kRows = Group::kFrameRows;
  static constexpr Shared kLogSums = Table::kEnd;  // the two parts of the log-sum-exp of a warp's own rows
  static constexpr uint32_t kShared = kLogSums + Tile::kWarps * kWarp * sizeof(float);
  static constexpr bool kTableGradient = true;
  static_assert((Own - Tile::kOwn) % Tile::kBytes == 0);
  struct alignas(4) Pair {
    Element e[2];
  };

  NarrowLeft<M, Tile> query, grad_output;
  float of_scores[4], of_products[4];  // where products start: of S at less than the log-sum-exp, of dP at -D

  NATTEN_EXT_DEVICE static uint32_t own_slot(int tensor) {
    return (Own - Tile::kOwn) / Tile::kBytes + (narrow_thread() / kWarp * kOwnRooms + tensor) * kWarpRows;
  }
  NATTEN_EXT_DEVICE static uint32_t result_slot() { return own_slot(Early ? Tensors : 0); }

  // Has the kernel K do its work: of a tile's keys, and of each group in turn.
  template <class K>
  NATTEN_EXT_DEVICE static void run_queries(const NarrowParams& p) {
    const int head = p.head[narrow_launch_head(p)];
    fill_narrow_table<Element, Tile>(p, head);
    Table table;
    for (int index = narrow_block_of_head(p); index < p.tiles; index += p.blocks_per_head) {
      const Tile tile(p, forget(head), index);
      if (!tile.exists) continue;
      sync_block();  // shared memory is free again
      K::stage_keys(p, tile);
      const auto stage_own = [&](const Group& group) {
        if (!group.empty()) {
          K::stage_own(p, tile, group);
          stage_log_sum(p, tile, group);
        }
        copy_async_commit();
      };
      if (Early) stage_own(Group(p, tile, 0));
      NATTEN_EXT_NO_UNROLL
      for (int i = 0; i < Tile::kGroups; ++i) {
        const Group group(p, tile, i);
        if (!Early) stage_own(group);
        copy_async_wait<0>();
        if (i == 0) sync_block();
        else sync_warp();
        K gradients;
        if (!group.empty()) gradients.load(p, tile, group);
        if (Early && i + 1 < Tile::kGroups) {
          sync_warp();
          stage_own(Group(p, tile, i + 1));
        }
        if (group.empty()) continue;
        const Columns columns(group);
        table.begin(group, columns);
        // Not with NaN where products start: the table's gradient is summed as it is found.
        const bool is_plain = !any_in_warp(is_nan(gradients.of_scores[0]) || is_nan(gradients.of_scores[2]));
        const bool is_finite = is_plain && gradients.attend(p, group, columns, table);
        // Computed again, which saves registers.
        const Tile again = K::kKeepsTile ? tile : Tile(p, head, forget(index));
        const Group same(p, again, forget(i));
        // Zero times NaN is NaN: as in `with_care`.
        if (!is_finite) gradients.attend_carefully(p, again, same, Columns(same), !is_plain);
        gradients.write(p, again, same);
      }
    }
    if (any_in_warp(table.place != Table::kNothing)) table.flush();
    if (p.table_partials != nullptr) Table::write(p);
  }

  NATTEN_EXT_DEVICE static Shared log_sum_at(uint32_t i) {
    return kLogSums + (narrow_thread() / kWarp * kWarp + i) * static_cast<Shared>(sizeof(float));
  }
  // Starts the copies of the two parts of the log-sum-exp: each lane has one number of one row.
  NATTEN_EXT_DEVICE static void stage_log_sum(const NarrowParams& p, const Tile& tile, const Group& group) {
    const uint32_t lane = narrow_lane(), row = lane % kWarpRows;
    const auto* from = static_cast<const float*>(lane < kWarpRows ? p.base : p.log_sum);
    // Another group's queries have no weights: in the table's gradient they count once.
    if (group.owns(row)) copy_async<4>(log_sum_at(lane), from + group.row_index(p, tile, row), true);
    else store_shared(log_sum_at(lane), kInfinity<float>);
  }
  NATTEN_EXT_DEVICE void load_log_sum(const NarrowParams& p) {
    float starts[2];
    NATTEN_EXT_UNROLL
    for (uint32_t h = 0; h < 2; ++h) {
      const uint32_t row = narrow_lane() / 4 + 8 * h;
      const float base = load_shared<float>(log_sum_at(row)), log_sum = load_shared<float>(log_sum_at(row + kWarpRows));
      starts[h] = start_of_scores(p, base, log_sum);
    }
    start(of_scores, starts[0], starts[1]);
  }
  // A product of zeros, so that the compiler takes the four for different numbers: it would copy equal ones each time.
  NATTEN_EXT_DEVICE static void start(float (&products)[4], float upper, float lower) {
    products[0] = products[1] = upper;
    products[2] = products[3] = lower;
    const uint32_t zeros[2] = {0, 0};
    multiply<Element>(products, zeros, 0);
  }
  // The two parts of the log-sum-exp, as they are.
  struct LogSum {
    float base, log_sum;
    NATTEN_EXT_DEVICE LogSum(const NarrowParams& p, uint64_t row) {
      base = load_global(static_cast<const float*>(p.base) + row);
      log_sum = load_global(static_cast<const float*>(p.log_sum) + row);
    }
    // Of a row of the group; infinite if it is another's.
    NATTEN_EXT_DEVICE LogSum(const NarrowParams& p, const Tile& tile, const Group& group, uint32_t row) {
      base = log_sum = kInfinity<float>;
      if (group.owns(row)) *this = LogSum(p, group.row_index(p, tile, row));
    }
  };
  // Writes chunk `chunk` of what key-centred kernels take off products of a row: `first` and `second`, or if these are too large or not
  // finite what `exactly()` returns.
  template <class Exactly>
  NATTEN_EXT_DEVICE static void store_numbers(const NarrowParams& p, uint64_t chunk, float first, float second, Exactly exactly) {
    using Parts = NumberParts<Element>;
    Parts parts = Parts::of(first, second);
    if (!Parts::fits(first) || !Parts::fits(second)) parts = exactly();
    store_global(reinterpret_cast<Parts*>(p.row_numbers.data) + chunk, parts);
  }

  NATTEN_EXT_DEVICE static void load_y(float (&y)[2], const NarrowParams& p, const Tile& tile, const Group& group) {
    y[0] = y[1] = 0;
    if (p.grad_lse == nullptr) return;
    const uint32_t g = narrow_lane() / 4;
    NATTEN_EXT_UNROLL
    for (int h = 0; h < 2; ++h) {
      if (!group.owns(g + 8 * h)) continue;
      y[h] = load_global(static_cast<const float*>(p.grad_lse) + group.row_index(p, tile, g + 8 * h));
    }
  }

  // D: products of rows of grad_output and output, formed as dP is: the diagonals of two blocks.
  NATTEN_EXT_DEVICE void load_d(float (&d)[2], int output) const {
    const uint32_t lane = narrow_lane(), g = lane / 4, matrix = lane / 8;
    float c[2][4];
    clear(c);
    NATTEN_EXT_UNROLL
    for (int b = 0; b < 2; ++b) {
      const Shared row = Tile::kOwn + Tile::place(own_slot(output) + 8 * b + lane % 8, matrix % Tile::kChunks);
      uint32_t words[4];
      load_matrices(words, row);
      grad_output.multiply_rows(c[b], [&](int chunk) { return words[chunk]; });
    }
    NATTEN_EXT_UNROLL
    for (int h = 0; h < 2; ++h) d[h] = shuffle(g % 2 ? c[h][2 * h + 1] : c[h][2 * h], 4 * g + g / 2);
  }

  // Takes what is left over of sums that should be zero, times the keys at the queries' own places, off their results. `region`: of
  // keys, or of what else is staged like them. See subtract_rows in rows.h.
  NATTEN_EXT_DEVICE static void subtract_keys(float (&acc)[Tile::kChunks][4], const float (&left_over)[2], Shared region, const Group& group) {
    const uint32_t lane = narrow_lane(), g = lane / 4, t = lane % 4;
    NATTEN_EXT_UNROLL
    for (int h = 0; h < 2; ++h) {
      const Shared row = region + Tile::place(group.own_key + h * Tile::kColumns + g, 0) + 4 * t;
      NATTEN_EXT_UNROLL
      for (int n = 0; n < static_cast<int>(Tile::kChunks); ++n) {
        const Pair pair = load_shared<Pair>(row ^ 16 * n);
        NATTEN_EXT_UNROLL
        for (int e = 0; e < 2; ++e) acc[n][2 * h + e] = fused_multiply_add(-left_over[h], widen(pair.e[e]), acc[n][2 * h + e]);
      }
    }
  }
};

}  // namespace natten_ext::cuda
