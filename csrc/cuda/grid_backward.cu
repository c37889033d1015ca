// Backward of grids of 16 x 16 windows (grid.h) in heads of up to 16 channels, both sides in one kernel.
//
// A block has a window, and a warp two rows of queries at a time, then two rows of keys, with their gradients in registers:
//   1. queries meet all keys, a row of them at a time: that gives their gradients, and what D lacks;
//   2. keys meet all queries, with the D that is known now: that gives the gradients of keys, values and the table.
// So scores and weights are computed twice, and no sums over warps are needed. backward.cu says what corrects D.
#include "grid_diagonals.h"
#include "grid_double.h"
#include "grid_launch.h"

namespace natten_ext::cuda {

template <class M, int Dim>
struct GridBackward {
  using Element = typename M::Element;
  using Tile = GridTile<Dim, Dim == 8 ? 4 : 8>;
  using Rows = GridGroup<Tile, true>;
  using Left = NarrowLeft<M, Tile>;
  using Fragment = float[Tile::kChunks][4];
  static constexpr int kChunks = Tile::kChunks;
  static constexpr int kBlocksAtATime = 16 / Tile::kWarps;  // on a multiprocessor
  static constexpr bool kVotes = Dim == 16;  // after each row of queries, against spills
  static constexpr bool kTableGradient = true;
  static constexpr int kRowNumbers = 0;

  // Regions of a window's rows.
  static constexpr Shared kKeys = 0, kValues = Tile::kRegion, kQueries = 2 * Tile::kRegion, kGradOutputs = 3 * Tile::kRegion;
  static constexpr Shared kOutputs = 4 * Tile::kRegion, kTable = 5 * Tile::kRegion;
  // Where products of scores and of dP start: numbers of two queries, twice, as products of keys with queries want them. The second come
  // to the places of outputs.
  static constexpr Shared kStarts = kTable + Tile::kTableBytes;
  // The two parts of the log-sum-exp.
  static constexpr Shared kBases = kStarts + Tile::kSlots * 8, kLogSums = kBases + Tile::kSlots * 4;
  using Diagonals = GridDiagonals<Tile, true, kLogSums + Tile::kSlots * 4>;
  static constexpr uint32_t kShared = Diagonals::kEnd;

  NATTEN_EXT_DEVICE static int first_row() { return static_cast<int>(narrow_thread() / kWarp) * 2; }
  NATTEN_EXT_DEVICE static Shared score_start(int slot) { return kStarts + slot / 2 * 16 + slot % 2 * 4; }
  NATTEN_EXT_DEVICE static Shared product_start(int slot) { return kOutputs + Tile::place(slot / 2 * 2, 0) + slot % 2 * 4; }
  NATTEN_EXT_DEVICE static void store_start(Shared to, float value) {
    store_shared(to, value);
    store_shared(to + 8, value);
  }
  // What a (batch, heads, queries) array has for a query of the window.
  NATTEN_EXT_DEVICE static float number(const NarrowParams& p, const GridWindow& window, const void* array, int slot) {
    return load_global(static_cast<const float*>(array) + window.row_index(p, slot / kGridWindow, slot % kGridWindow));
  }
  NATTEN_EXT_DEVICE static float grad_lse(const NarrowParams& p, const GridWindow& window, int slot) {
    return p.grad_lse != nullptr ? number(p, window, p.grad_lse, slot) : 0;
  }
  // Of the lane's queries g and g + 8 of a row.
  NATTEN_EXT_DEVICE static int slot_of(int row, int h) { return row * kGridWindow + static_cast<int>(narrow_lane() / 4) + 8 * h; }

  NATTEN_EXT_DEVICE static void run(const NarrowParams& p) {
    const int head = p.head[narrow_launch_head(p)];
    Diagonals::clear();
    fill_grid_table<Element, Tile>(p, head, kTable);
    for (int index = narrow_block_of_head(p); index < p.tiles; index += p.blocks_per_head) {
      const GridWindow window(p, head, index);
      stage_grid_window<Tile>(p, window, {&p.query, &p.key, &p.value, &p.grad_output, &p.output},
                              {kQueries, kKeys, kValues, kGradOutputs, kOutputs});
      copy_async_commit();
      const bool plain = find_score_starts(p, window);
      copy_async_wait<0>();
      // If not, scores are formed as in the forward, and the two parts of their log-sum-exp taken off one by one.
      const bool exact = any_in_block(!plain);
      if (exact) {
        for (int slot = thread_index(); slot < Tile::kSlots; slot += Tile::kThreads) store_start(score_start(slot), 0);
        sync_block();
      }
      NATTEN_EXT_NO_UNROLL
      for (int row = first_row(); row < kGridWindow; row += 2 * Tile::kWarps) attend_keys(p, window, row, exact);
      sync_block();
      NATTEN_EXT_NO_UNROLL
      for (int row = first_row(); row < kGridWindow; row += 2 * Tile::kWarps) attend_queries(p, window, row, exact);
      sync_block();  // shared memory is free again
    }
    if (p.table_partials == nullptr) return;
    float* to = Diagonals::partials(p);
    Diagonals::for_each_sum([&](int entry, float sum) { store_global(to + entry, sum); });
  }

  // Log-sum-exps up to this (in base 2) may be taken off products before these are scaled: the error is that of a float of this size.
  static constexpr float kPlain = 256;

  // Whether products may start at log-sum-exps.
  NATTEN_EXT_DEVICE static bool find_score_starts(const NarrowParams& p, const GridWindow& window) {
    bool plain = true;
    NATTEN_EXT_UNROLL
    for (int first = 0; first < Tile::kSlots; first += Tile::kThreads) {
      const int slot = first + thread_index();
      const float base = number(p, window, p.base, slot), log_sum = number(p, window, p.log_sum, slot);
      const float lse = base + log_sum, start = -lse / p.factor;
      store_shared(kBases + 4 * slot, base);
      store_shared(kLogSums + 4 * slot, log_sum);
      store_start(score_start(slot), start);
      plain = plain && lse * lse <= kPlain * kPlain && start * 0 == 0;
    }
    return plain;
  }

  // ------------------------------------------------------------------------------------------ pairs

  // Pairs of a warp's two rows with a staged row: weights, and their gradients dS.
  struct Pairs {
    float weights[2][2][4], gradients[2][2][4];
  };
  // `ByKey`: own rows are keys, and staged ones queries.
  template <bool ByKey>
  struct Side {
    using Entries = RowEntries<Tile, ByKey>;
    // Where a lane finds its part of 16 staged rows: as right operands of scores, and of sums over these rows.
    static constexpr Shared kStaged = ByKey ? kQueries : kKeys, kOthers = ByKey ? kGradOutputs : kValues;
    Left own[2], others[2];  // queries and gradients of outputs, or keys and values
    int first_row;
    bool exact;
    Shared entries_at, of_scores, of_sums;
    Entries before;  // the second own row has those that the first had with the staged row before

    NATTEN_EXT_DEVICE Side(int first_row, bool exact)
        : first_row(first_row), exact(exact), entries_at(Entries::first(first_row, kTable)), before(entries_at - Entries::kStep) {
      NATTEN_EXT_UNROLL
      for (int r = 0; r < 2; ++r) {
        own[r].load_from((ByKey ? kKeys : kQueries) + Rows(first_row + r, 0).left_place());
        others[r].load_from((ByKey ? kValues : kGradOutputs) + Rows(first_row + r, 0).left_place());
      }
      const uint32_t lane = narrow_lane();
      of_scores = Tile::place(kChunks == 1 ? lane % 16 : lane % 8 + lane / 16 * 8, lane / 8 % kChunks);
      of_sums = Tile::place(lane % 16, lane / 16 % kChunks);
    }
    // Products start at numbers of queries, of own row r or of half b of a staged row.
    NATTEN_EXT_DEVICE void find(Pairs& pairs, const NarrowParams& p, const float (&score_starts)[2][4], const float (&product_starts)[2][4],
                                int row) {
      const auto multiply = [&](float (&c)[2][2][4], const float (&starts)[2][4], const Left (&left)[2], Shared region) {
        uint32_t words[2 * kChunks];
        load_matrices(words, region + of_scores + row * Tile::kRowBytes);
        NATTEN_EXT_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int r = i / 2, b = i % 2;
          left[r].multiply_rows_from(c[r][b], starts[ByKey ? b : r], [&](int chunk) { return words[b * kChunks + chunk]; });
        }
      };
      multiply(pairs.weights, score_starts, own, kStaged);
      multiply(pairs.gradients, product_starts, others, kOthers);
      const Entries entries(entries_at + row * Entries::kStep);
      NATTEN_EXT_UNROLL
      for (int i = 0; i < 16; ++i) {
        const int r = i / 8, b = i / 4 % 2, e = i % 4;
        float& score = pairs.weights[r][b][e];
        score = fused_multiply_add(score, p.factor, (r ? before : entries).of(b, e));
      }
      before = entries;
      if (exact) subtract_log_sum_exps(pairs.weights, row);
      NATTEN_EXT_UNROLL
      for (int i = 0; i < 16; ++i) {
        float& weight = pairs.weights[i / 8][i / 4 % 2][i % 4];
        weight = power_of_two(weight);
        pairs.gradients[i / 8][i / 4 % 2][i % 4] *= weight;
      }
    }
    // Numbers of queries differ by two of a lane's indices only: its own rows and their halves, or columns of both halves of a staged row.
    NATTEN_EXT_DEVICE void subtract_log_sum_exps(float (&scores)[2][2][4], int row) const {
      NATTEN_EXT_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int column = 8 * (i / 2) + static_cast<int>(narrow_lane() % 4) * 2 + i % 2;
        const int slot = ByKey ? row * kGridWindow + column : slot_of(first_row + i / 2, i % 2);
        const float base = load_shared<float>(kBases + 4 * slot), log_sum = load_shared<float>(kLogSums + 4 * slot);
        NATTEN_EXT_UNROLL
        for (int k = 0; k < 4; ++k) {
          float& score = ByKey ? scores[k / 2][i / 2][k % 2 * 2 + i % 2] : scores[i / 2][k / 2][i % 2 * 2 + k % 2];
          score = score - base - log_sum;
        }
      }
    }
    // A staged row of a region, as right operand of sums.
    struct Operand {
      uint32_t words[2 * kChunks];
    };
    NATTEN_EXT_DEVICE Operand operand(Shared region, int row) const {
      Operand operand;
      load_matrices_transposed(operand.words, region + of_sums + row * Tile::kRowBytes);
      return operand;
    }
    // Adds `weights` of own rows times that row.
    NATTEN_EXT_DEVICE static void add(Fragment (&sums)[2], const uint32_t (&weights)[2][4], const Operand& operand) {
      const auto& words = operand.words;
      NATTEN_EXT_UNROLL
      for (int i = 0; i < 2 * kChunks; ++i) {
        const int r = i / kChunks, n = i % kChunks;
        multiply<Element>(sums[r][n], weights[r], words[2 * n], words[2 * n + 1]);
      }
    }
  };

  // ------------------------------------------------------------------------------------------ queries

  NATTEN_EXT_DEVICE static void attend_keys(const NarrowParams& p, const GridWindow& window, int first_row, bool exact) {
    Side<false> side(first_row, exact);
    float score_starts[2][4], product_starts[2][4];
    NATTEN_EXT_UNROLL
    for (int r = 0; r < 2; ++r) {
      float d[2];
      find_d(d, p, window, side.others[r], first_row + r);
      NATTEN_EXT_UNROLL
      for (int h = 0; h < 2; ++h) {
        // Numbers that are equal but come from different places: or the compiler would keep one, and copy it before each product.
        const Shared from = score_start(slot_of(first_row + r, h));
        score_starts[r][2 * h] = load_shared<float>(from), score_starts[r][2 * h + 1] = load_shared<float>(from + 8);
        product_starts[r][2 * h] = -d[h], product_starts[r][2 * h + 1] = shuffle_xor(-d[h], 1);
      }
    }
    Fragment sums[2], mean_keys[2];
    float totals[2][4];
    clear(sums[0]), clear(sums[1]), clear(mean_keys[0]), clear(mean_keys[1]), clear(totals);
    const uint32_t ones = pack<Element>(1, 1);
    NATTEN_EXT_NO_UNROLL
    for (int first = 0; first < kGridWindow; first += 2) {
      NATTEN_EXT_UNROLL
      for (int i = 0; i < 2; ++i) {
        Pairs pairs;
        side.find(pairs, p, score_starts, product_starts, first + i);
        uint32_t gradients[2][4], weights[2][4];
        NATTEN_EXT_UNROLL
        for (int r = 0; r < 2; ++r) {
          pack_weights<Element>(gradients[r], pairs.gradients[r]);
          pack_weights<Element>(weights[r], pairs.weights[r]);
          multiply<Element>(totals[r], gradients[r], ones, ones);
        }
        const auto keys = side.operand(kKeys, first + i);
        side.add(sums, gradients, keys);
        side.add(mean_keys, weights, keys);
      }
    }
    sync_warp();  // the warp's outputs, which are written over, have been read
    NATTEN_EXT_UNROLL
    for (int r = 0; r < 2; ++r) finish_queries(p, window, sums[r], mean_keys[r], totals[r], product_starts[r], first_row + r);
  }
  // D: products of rows of grad_output and output, formed as dP is: the diagonals of two blocks. The gradient of the log-sum-exp comes off.
  NATTEN_EXT_DEVICE static void find_d(float (&d)[2], const NarrowParams& p, const GridWindow& window, const Left& grad_output, int row) {
    const uint32_t g = narrow_lane() / 4;
    Left output;
    output.load_from(kOutputs + Rows(row, 0).left_place());
    float c[2][4];
    clear(c);
    NATTEN_EXT_UNROLL
    for (int h = 0; h < 2; ++h) {
      grad_output.multiply_rows(c[h], [&](int chunk) { return output.a[0][2 * chunk + h]; });
      d[h] = shuffle(g % 2 ? c[h][2 * h + 1] : c[h][2 * h], 4 * g + g / 2) - grad_lse(p, window, slot_of(row, h));
    }
  }

  // Rows of dS sum to y. What is left over is what D lacks, and roundings.
  NATTEN_EXT_DEVICE static void finish_queries(const NarrowParams& p, const GridWindow& window, Fragment& sums, const Fragment& mean_keys,
                                               const float (&totals)[4], const float (&product_starts)[4], int row) {
    float lacking[2];
    NATTEN_EXT_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int slot = slot_of(row, h);
      lacking[h] = totals[2 * h] - grad_lse(p, window, slot);
      // If float16 has no numbers for dS, as D is: the table's gradient, in float32, may have them.
      if (narrow_lane() % 4 == 0) store_start(product_start(slot), product_starts[2 * h] - (lacking[h] * 0 == 0 ? lacking[h] : 0));
    }
    subtract_products(sums, lacking, mean_keys);
    if (p.grad_query.data != nullptr) write_row<Element>(sums, p.scale, p, window, p.grad_query, row);
  }

  // ------------------------------------------------------------------------------------------ keys

  NATTEN_EXT_DEVICE static void attend_queries(const NarrowParams& p, const GridWindow& window, int first_row, bool exact) {
    Side<true> side(first_row, exact);
    Fragment grad_key[2], grad_value[2];
    NATTEN_EXT_UNROLL
    for (int r = 0; r < 2; ++r) clear(grad_key[r]), clear(grad_value[r]);
    Diagonals diagonals(first_row);
    NATTEN_EXT_NO_UNROLL
    for (int first = 0; first < kGridWindow; first += 2) {
      NATTEN_EXT_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int row = first + i;
        float score_starts[2][4], product_starts[2][4];
        load_starts(score_starts, product_starts, row);
        Pairs pairs;
        side.find(pairs, p, score_starts, product_starts, row);
        uint32_t weights[2][4], gradients[2][4];
        NATTEN_EXT_UNROLL
        for (int r = 0; r < 2; ++r) {
          pack_weights<Element>(weights[r], pairs.weights[r]);
          pack_weights<Element>(gradients[r], pairs.gradients[r]);
        }
        side.add(grad_value, weights, side.operand(kGradOutputs, row));
        side.add(grad_key, gradients, side.operand(kQueries, row));
        if (p.table_partials != nullptr) diagonals.add(pairs.gradients);
        if (kVotes && never(pairs.weights[0][0][0])) return;
      }
      if (p.table_partials != nullptr) sync_block();
    }
    if (p.table_partials != nullptr) diagonals.add_last();
    NATTEN_EXT_UNROLL
    for (int r = 0; r < 2; ++r) {
      if (p.grad_value.data != nullptr) write_row<Element>(grad_value[r], 1, p, window, p.grad_value, first_row + r);
      if (p.grad_key.data != nullptr) write_row<Element>(grad_key[r], p.scale, p, window, p.grad_key, first_row + r);
    }
  }
  // Of queries 2t and 2t + 1 of both halves of a row.
  NATTEN_EXT_DEVICE static void load_starts(float (&scores)[2][4], float (&products)[2][4], int row) {
    struct alignas(16) Four {
      float e[4];
    };
    NATTEN_EXT_UNROLL
    for (int b = 0; b < 2; ++b) {
      const int slot = row * kGridWindow + 8 * b + static_cast<int>(narrow_lane() % 4) * 2;
      const Four score = load_shared<Four>(score_start(slot)), product = load_shared<Four>(product_start(slot));
      NATTEN_EXT_UNROLL
      for (int e = 0; e < 4; ++e) scores[b][e] = score.e[e], products[b][e] = product.e[e];
    }
  }
};

template <class M>
bool grid_backward(const Params& p, const std::vector<Window>& windows, Context& context) {
  return launch_grid<M, GridBackward>(p, windows, context, GridBackwardDims<M>{});
}
template <class M>
bool grid_backward_takes(const Params& p, const std::vector<Window>& windows, const Context& context) {
  return grid_takes<M, GridBackward>(p, windows, context, GridBackwardDims<M>{});
}

template bool grid_backward<NATTEN_EXT_MODE>(const Params&, const std::vector<Window>&, Context&);
template bool grid_backward_takes<NATTEN_EXT_MODE>(const Params&, const std::vector<Window>&, const Context&);

}  // namespace natten_ext::cuda
