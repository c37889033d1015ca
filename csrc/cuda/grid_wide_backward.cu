// Backward of grids of 16 x 16 windows (grid.h) in heads of more than 16 channels, both sides in one kernel.
//
// A block has a window, and each of its eight warps two rows of keys, whose gradients stay in its registers. It walks over the queries
// twice, a row of them at a time:
//   1. for the gradients of values, from scores and weights P;
//   2. for all others. Sums of P dP over a warp's keys go to the other warps: so D is known in full before dS is rounded. dS adds to
//      the gradients of keys and of the table, and goes to shared memory. Once some rows are there, each warp has a share of the channels of
//      the gradients of one of them. There is one barrier per row.
// Outputs are not needed: D is the sum of P dP, less the gradient of the log-sum-exp.
#include "grid_diagonals.h"
#include "grid_launch.h"

namespace natten_ext::cuda {

template <class M, int Dim>
struct GridWideBackward {
  using Element = typename M::Element;
  using Tile = GridTile<Dim, 8>;
  using Rows = GridGroup<Tile, true>;
  using Left = NarrowLeft<M, Tile>;
  using Fragment = float[Tile::kChunks][4];
  using Products = float[2][2][4];  // of two rows of keys with both halves of a row of queries
  static constexpr int kChunks = Tile::kChunks, kSteps = Left::kSteps;
  static constexpr int kBlocksAtATime = 1;  // on a multiprocessor
  static constexpr bool kTableGradient = true;
  static constexpr int kRowNumbers = 0;

  // Regions of a window's rows. Once a warp has its values in registers, nobody needs their region.
  static constexpr Shared kKeys = 0, kQueries = Tile::kRegion, kGradOutputs = 2 * Tile::kRegion, kValues = 3 * Tile::kRegion;
  // dS of some rows of queries, and of the one after: rows of keys, as those of a tensor with 16 channels.
  static constexpr int kTogether = Dim > 80 ? 2 : 4;                                // rows of gradients at a time
  static constexpr int kShares = Tile::kWarps / kTogether;  // in how many shares of channels
  static constexpr int kShare = kChunks / kShares;
  static_assert(kChunks % kShares == 0);
  using Pairs = GridTile<kGridWindow, Tile::kWarps>;
  static constexpr Shared kPairs = kValues;
  static constexpr Shared kDiagonals = kPairs + (kTogether + 1) * Pairs::kRegion;  // of the table's gradient
  using Diagonals = GridDiagonals<Tile, true, kDiagonals>;
  static constexpr Shared kScratchEnd = Diagonals::kEnd, kRegionsEnd = kValues + Tile::kRegion;
  static constexpr Shared kTable = ((kScratchEnd > kRegionsEnd ? kScratchEnd : kRegionsEnd) + 127) / 128 * 128;
  // Of queries: the two parts of the log-sum-exp, and its gradient.
  enum Number { kBase, kLogSum, kGradLse, kNumberCount };
  static constexpr Shared kNumbers = kTable + Tile::kTableBytes, kNumberBytes = Tile::kSlots * sizeof(float);
  // Sums of P dP over the keys of a warp, of two rows of queries in turn.
  static constexpr Shared kSums = kNumbers + kNumberCount * kNumberBytes, kSumBytes = 24 * sizeof(float);  // so that banks differ
  static constexpr Shared kTableSums = kSums + 2 * Tile::kWarps * kSumBytes;  // of all windows of the block
  static constexpr uint32_t kShared = kTableSums + Diagonals::kExtent * Diagonals::kExtent * sizeof(float);

  struct alignas(8) Pair {
    float e[2];
  };
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  static constexpr bool kRuns = kShared <= 163 * 1024;  // there is no more, so the host never launches it
#else
  static constexpr bool kRuns = true;
#endif

  Fragment sums[2];

  NATTEN_EXT_DEVICE static int warp() { return static_cast<int>(narrow_thread() / kWarp); }
  NATTEN_EXT_DEVICE static Rows own_row(int r) { return Rows(2 * warp() + r, 0); }
  // Where a lane finds its part of 16 rows: as right operands of scores, and of sums over these rows.
  NATTEN_EXT_DEVICE static Shared score_place() { return Tile::place(narrow_lane() % 8 + narrow_lane() / 16 * 8, narrow_lane() / 8 % 2); }
  NATTEN_EXT_DEVICE static Shared sum_place() { return Tile::place(narrow_lane() % 16, narrow_lane() / 16); }
  NATTEN_EXT_DEVICE static Shared number(Number which, int slot) {
    return kNumbers + which * kNumberBytes + slot * static_cast<Shared>(sizeof(float));
  }
  // A number of the lane's queries 2t and 2t + 1 in both halves of row `row`.
  NATTEN_EXT_DEVICE static void load_numbers(Pair (&numbers)[2], Number which, int row) {
    NATTEN_EXT_UNROLL
    for (int b = 0; b < 2; ++b) numbers[b] = load_shared<Pair>(number(which, row * kGridWindow + 8 * b + narrow_lane() % 4 * 2));
  }

  NATTEN_EXT_DEVICE static void run(const NarrowParams& p) {
    if constexpr (!kRuns) return;
    const int head = p.head[narrow_launch_head(p)];
    Diagonals::for_each_entry([](int entry) { store_shared(table_sum(entry), 0.0f); });
    const int first = narrow_block_of_head(p);
    for (int index = first; index < p.tiles; index += p.blocks_per_head) {
      const GridWindow window(p, head, index);
      stage_grid_window<Tile>(p, window, {&p.query, &p.key, &p.value, &p.grad_output}, {kQueries, kKeys, kValues, kGradOutputs});
      stage_numbers(p, window);
      copy_async_commit();
      if (index == first) fill_grid_table<Element, Tile>(p, head, kTable);
      copy_async_wait<0>();
      sync_block();
      GridWideBackward gradients;
      gradients.attend_values(p, window);
      gradients.attend(p, window);
      sync_block();  // shared memory is free again
    }
    if (p.table_partials == nullptr) return;
    float* to = Diagonals::partials(p);
    Diagonals::for_each_entry([&](int entry) { store_global(to + entry, load_shared<float>(table_sum(entry))); });
  }
  NATTEN_EXT_DEVICE static Shared table_sum(int entry) { return kTableSums + entry * static_cast<Shared>(sizeof(float)); }

  NATTEN_EXT_DEVICE static void stage_numbers(const NarrowParams& p, const GridWindow& window) {
    const uint32_t slot = narrow_thread();
    static_assert(Tile::kThreads == Tile::kSlots);
    const uint64_t row = window.row_index(p, slot / kGridWindow, slot % kGridWindow);
    copy_async<4>(number(kBase, slot), static_cast<const float*>(p.base) + row, true);
    copy_async<4>(number(kLogSum, slot), static_cast<const float*>(p.log_sum) + row, true);
    copy_async<4>(number(kGradLse, slot), static_cast<const float*>(p.grad_lse) + row, p.grad_lse != nullptr);
  }

  // ------------------------------------------------------------------------------------------ products

  // A warp's rows of keys or values as left operands: `Held` in registers, or loaded when they are needed.
  template <bool Held>
  struct OwnRows {
    Shared region;
    Left rows[2];
    NATTEN_EXT_DEVICE OwnRows(Shared region) : region(region) {
      NATTEN_EXT_UNROLL
      for (int r = 0; r < 2 && Held; ++r) rows[r].load_from(region + own_row(r).left_place());
    }
    NATTEN_EXT_DEVICE const uint32_t (&step(int r, int k, uint32_t (&room)[4]) const)[4] {
      if constexpr (Held) return rows[r].a[k];
      load_matrices(room, Tile::further(region + own_row(r).left_place(), 2 * k));
      return room;
    }
  };
  static constexpr bool kKeysHeld = Dim <= 80;  // as far as registers go
  // Of own rows of keys or values with a row of queries or gradients of outputs.
  template <bool Held>
  NATTEN_EXT_DEVICE static void multiply_rows(Products& c, const OwnRows<Held>& own, Shared rows) {
    clear(c[0]), clear(c[1]);
    NATTEN_EXT_UNROLL
    for (int k = 0; k < kSteps; ++k) {
      uint32_t words[4];
      load_matrices(words, Tile::further(rows, 2 * k));
      NATTEN_EXT_UNROLL
      for (int r = 0; r < 2; ++r) {
        uint32_t room[4];
        const auto& left = own.step(r, k, room);
        NATTEN_EXT_UNROLL
        for (int b = 0; b < 2; ++b) multiply<Element>(c[r][b], left, words[2 * b], words[2 * b + 1]);
      }
    }
  }
  // Adds weights times a row of queries or gradients of outputs.
  NATTEN_EXT_DEVICE static void add_rows(Fragment (&sums)[2], const uint32_t (&weights)[2][4], Shared rows) {
    NATTEN_EXT_UNROLL
    for (int k = 0; k < kSteps; ++k) {
      uint32_t words[4];
      load_matrices_transposed(words, Tile::further(rows, 2 * k));
      NATTEN_EXT_UNROLL
      for (int i = 0; i < 4; ++i) multiply<Element>(sums[i / 2][2 * k + i % 2], weights[i / 2], words[i % 2 * 2], words[i % 2 * 2 + 1]);
    }
  }
  // The table's entries of a lane's pairs: keys half a row to the left of the queries' half, in the same, and to the right. Of two
  // queries the second's comes first. Those of the second row of keys are those that the first row had with the row of queries before.
  struct Entries {
    Shared address;
    Pair e[2][3] = {};
    NATTEN_EXT_DEVICE Entries() {
      const int lane = static_cast<int>(narrow_lane()), column = lane / 4 - lane % 4 * 2 + kGridWindow - 2;
      const int copy = column % 2 * (static_cast<int>(Tile::kShifted) - static_cast<int>(sizeof(float)));
      address = kTable + (2 * warp() + kGridWindow - 1) * Tile::kTableRow + column * static_cast<int>(sizeof(float)) + copy;
      load(-1);
    }
    NATTEN_EXT_DEVICE void load(int row) {
      NATTEN_EXT_UNROLL
      for (int i = 0; i < 3; ++i) {
        e[1][i] = e[0][i];
        e[0][i] = load_shared<Pair>(address - row * static_cast<int>(Tile::kTableRow) + (i - 1) * 8 * static_cast<int>(sizeof(float)));
      }
    }
  };
  // Weights of a row of queries.
  template <bool Held>
  NATTEN_EXT_DEVICE static void load_weights(const NarrowParams& p, Products& weights, Entries& entries, const OwnRows<Held>& keys, int row) {
    multiply_rows(weights, keys, kQueries + row * Tile::kRowBytes + score_place());
    Pair base[2], log_sum[2];
    load_numbers(base, kBase, row);
    load_numbers(log_sum, kLogSum, row);
    entries.load(row);
    NATTEN_EXT_UNROLL
    for (int r = 0; r < 2; ++r) {
      NATTEN_EXT_UNROLL
      for (int i = 0; i < 8; ++i) {
        const int b = i / 4, h = i / 2 % 2, e = i % 2;
        float& weight = weights[r][b][i % 4];
        weight = weight_of(fused_multiply_add(weight, p.factor, entries.e[r][h - b + 1].e[1 - e]), base[b].e[e], log_sum[b].e[e]);
      }
    }
  }

  // ------------------------------------------------------------------------------------------ values

  NATTEN_EXT_DEVICE void attend_values(const NarrowParams& p, const GridWindow& window) {
    if (p.grad_value.data == nullptr) return;
    clear(sums[0]), clear(sums[1]);
    const OwnRows<true> keys(kKeys);
    Entries entries;
    NATTEN_EXT_NO_UNROLL
    for (int row = 0; row < kGridWindow; ++row) {
      Products weights;
      load_weights(p, weights, entries, keys, row);
      uint32_t packed[2][4];
      NATTEN_EXT_UNROLL
      for (int r = 0; r < 2; ++r) pack_weights<Element>(packed[r], weights[r]);
      add_rows(sums, packed, kGradOutputs + row * Tile::kRowBytes + sum_place());
    }
  }

  // ------------------------------------------------------------------------------------------ all others

  NATTEN_EXT_DEVICE void attend(const NarrowParams& p, const GridWindow& window) {
    const OwnRows<true> values(kValues);
    const OwnRows<kKeysHeld> keys(kKeys);
    if (p.grad_value.data != nullptr) {
      NATTEN_EXT_UNROLL
      for (int r = 0; r < 2; ++r) own_row(r).template write<Element>(sums[r], {1, 1}, p, window, p.grad_value, kValues);
    }
    clear(sums[0]), clear(sums[1]);
    Diagonals diagonals(2 * warp());
    Entries entries;
    NATTEN_EXT_NO_UNROLL
    for (int row = 0; row < kGridWindow; ++row) {
      Products weights, gradients;
      load_weights(p, weights, entries, keys, row);
      multiply_rows(gradients, values, kGradOutputs + row * Tile::kRowBytes + score_place());
      send_sums(weights, gradients, row);
      sync_block();
      finish_gradients(weights, gradients, row);
      uint32_t packed[2][4];
      NATTEN_EXT_UNROLL
      for (int r = 0; r < 2; ++r) {
        pack_weights<Element>(packed[r], gradients[r]);
        const uint32_t lane = narrow_lane();
        store_matrices(pairs(row) + Pairs::place((2 * warp() + r) * kGridWindow + lane % 16, lane / 16), packed[r]);
      }
      if (p.table_partials != nullptr) diagonals.add(gradients, row < 2 || warp() == 0);
      add_rows(sums, packed, kQueries + row * Tile::kRowBytes + sum_place());
      if (row > 0 && row % kTogether == 0) attend_queries(p, window, row - kTogether);
    }
    if (p.table_partials != nullptr) diagonals.add_last(warp() == 0);
    sync_block();
    if (p.grad_key.data != nullptr) {
      NATTEN_EXT_UNROLL
      for (int r = 0; r < 2; ++r) own_row(r).template write<Element>(sums[r], {p.scale, p.scale}, p, window, p.grad_key, kGradOutputs);
    }
    attend_queries(p, window, kGridWindow - kTogether);
    if (p.table_partials == nullptr) return;
    Diagonals::for_each_sum([](int entry, float sum) { store_shared(table_sum(entry), load_shared<float>(table_sum(entry)) + sum); });
  }
  NATTEN_EXT_DEVICE static Shared pairs(int row) { return kPairs + row % (kTogether + 1) * Pairs::kRegion; }

  // Sums of P dP over the warp's keys go to shared memory, in the lanes' order of queries.
  NATTEN_EXT_DEVICE static void send_sums(const Products& weights, const Products& gradients, int row) {
    const uint32_t lane = narrow_lane(), query = lane / 16 * 8 + lane % 4 * 2 + lane / 8 % 2;
    const float grad_lse = load_shared<float>(number(kGradLse, row * kGridWindow + query));
    float sum[2][2] = {};  // of both halves of the row, of queries 2t and 2t + 1
    NATTEN_EXT_UNROLL
    for (int i = 0; i < 16; ++i) {
      const int r = i / 8, b = i / 4 % 2, e = i % 2;
      sum[b][e] = fused_multiply_add(weights[r][b][i % 4], gradients[r][b][i % 4], sum[b][e]);
    }
    // A lane keeps half of what it has, and gives the other half to another, until it has one sum.
    const bool right = lane & 16, odd = lane & 8;
    float half[2];
    NATTEN_EXT_UNROLL
    for (int e = 0; e < 2; ++e) half[e] = (right ? sum[1][e] : sum[0][e]) + shuffle_xor(right ? sum[0][e] : sum[1][e], 16);
    float total = (odd ? half[1] : half[0]) + shuffle_xor(odd ? half[0] : half[1], 8);
    total += shuffle_xor(total, 4);
    if (warp() == 0) total -= grad_lse;
    if ((lane & 4) == 0) store_shared(sum_of(warp(), query, row), total);
  }
  NATTEN_EXT_DEVICE static Shared sum_of(uint32_t warp, uint32_t query, int row) {
    return kSums + row % 2 * Tile::kWarps * kSumBytes + warp * kSumBytes + query * static_cast<Shared>(sizeof(float));
  }
  // dP becomes dS. Sums over warps are products with ones, of both parts of numbers in TF32: a lane gets those of its queries.
  NATTEN_EXT_DEVICE static void finish_gradients(const Products& weights, Products& gradients, int row) {
    const uint32_t lane = narrow_lane(), one = bits_of(1.0f), ones[4] = {one, one, one, one};
    float d[2][4];
    clear(d);
    NATTEN_EXT_UNROLL
    for (uint32_t b = 0; b < 2; ++b) {
      uint32_t parts[2][2];
      NATTEN_EXT_UNROLL
      for (uint32_t i = 0; i < 2; ++i) {
        const float sum = load_shared<float>(sum_of(lane % 4 + 4 * i, lane / 4 + 8 * b, row));
        parts[0][i] = bits_of(sum) & 0xffffe000;
        parts[1][i] = bits_of(sum - from_bits(parts[0][i]));
      }
      NATTEN_EXT_UNROLL
      for (int part = 0; part < 2; ++part) multiply<float>(d[b], ones, parts[part][0], parts[part][1]);
    }
    NATTEN_EXT_UNROLL
    for (int i = 0; i < 16; ++i) {
      const int r = i / 8, b = i / 4 % 2, e = i % 2;
      float& gradient = gradients[r][b][i % 4];
      gradient = weights[r][b][i % 4] * (gradient - d[b][e]);
    }
  }

  // ------------------------------------------------------------------------------------------ queries

  // A warp adds a share of the channels of the gradients of one row of queries, of those from `first` on, from dS of all keys. What the
  // rows of dS sum to, but for the gradient of the log-sum-exp, is left over from rounding: see subtract_rows in rows.h.
  NATTEN_EXT_DEVICE static void attend_queries(const NarrowParams& p, const GridWindow& window, int first) {
    if (p.grad_query.data == nullptr) return;
    struct alignas(4) Two {
      Element e[2];
    };
    const uint32_t lane = narrow_lane(), g = lane / 4, t = lane % 4;
    const int row = first + warp() / kShares, share = warp() % kShares * kShare;
    float acc[kShare][4], totals[4] = {0, 0, 0, 0};
    clear(acc);
    const uint32_t ones = pack<Element>(1, 1);
    Shared left_place = pairs(row) + Pairs::place(lane % 8 + lane / 16 * 8, lane / 8 % 2);
    Shared keys = kKeys + Tile::place(lane % 16, share + lane / 16), last_key = kKeys + Tile::place(lane % 16, share + kShare - 1);
    NATTEN_EXT_UNROLL_BY(2)
    for (int k = 0; k < kGridWindow; ++k) {
      uint32_t left[4], words[kShare / 2][4];
      load_matrices_transposed(left, left_place);
      NATTEN_EXT_UNROLL
      for (int n = 0; n < kShare / 2; ++n) load_matrices_transposed(words[n], Tile::further(keys, 2 * n));
      NATTEN_EXT_UNROLL
      for (int n = 0; n < kShare / 2 * 2; ++n) multiply<Element>(acc[n], left, words[n / 2][n % 2 * 2], words[n / 2][n % 2 * 2 + 1]);
      if constexpr (kShare % 2 != 0) {
        uint32_t last[2];
        load_matrices_transposed(last, last_key);
        multiply<Element>(acc[kShare - 1], left, last[0], last[1]);
      }
      multiply<Element>(totals, left, ones, ones);
      left_place += Pairs::kRowBytes, keys += Tile::kRowBytes, last_key += Tile::kRowBytes;
    }
    const Rows queries(row, 0);
    NATTEN_EXT_UNROLL
    for (uint32_t h = 0; h < 2; ++h) {
      const float total = totals[2 * h] - load_shared<float>(number(kGradLse, row * kGridWindow + g + 8 * h));
      NATTEN_EXT_UNROLL
      for (int n = 0; n < kShare; ++n) {
        const Shared place = queries.place(g + 8 * h, share + n) + 4 * t;
        const Two key = load_shared<Two>(kKeys + place);
        float result[2];
        NATTEN_EXT_UNROLL
        for (int e = 0; e < 2; ++e) result[e] = p.scale * fused_multiply_add(-total, widen(key.e[e]), acc[n][2 * h + e]);
        store_shared(kQueries + place, pack<Element>(result[0], result[1]));
      }
    }
    sync_warp();
    NATTEN_EXT_UNROLL
    for (uint32_t i = lane; i < kWarpRows * kShare; i += kWarp) {
      const uint32_t query = i / kShare, chunk = share + i % kShare;
      if (16 * chunk >= p.head_bytes) continue;
      store_global(window.address(p.grad_query, row, query) + 16 * chunk, load_shared<Vector16>(kQueries + queries.place(query, chunk)));
    }
  }
};

template <class M>
bool grid_wide_backward(const Params& p, const std::vector<Window>& windows, Context& context) {
  return launch_grid<M, GridWideBackward>(p, windows, context, GridWideBackwardDims<M>{});
}
template <class M>
bool grid_wide_backward_takes(const Params& p, const std::vector<Window>& windows, const Context& context) {
  return grid_takes<M, GridWideBackward>(p, windows, context, GridWideBackwardDims<M>{});
}

template bool grid_wide_backward<NATTEN_EXT_MODE>(const Params&, const std::vector<Window>&, Context&);
template bool grid_wide_backward_takes<NATTEN_EXT_MODE>(const Params&, const std::vector<Window>&, const Context&);

}  // namespace natten_ext::cuda
