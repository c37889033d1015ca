// Double backward of grids of 16 x 16 windows, the query-centred side (grid_double.h): gradients of queries and grad_output, and the
// numbers of each query for the key-centred kernel. A warp goes over all keys twice, for the sums of rows and for the gradients.
// double_backward.cu and docs/double_backward.md say what is computed.
#include "grid_double.h"
#include "grid_launch.h"

namespace natten_ext::cuda {

template <class M, int Dim>
struct GridDoubleBackwardQuery {
  using Element = typename M::Element;
  using Tile = PitchedTile<Dim>;
  using Own = OwnRow<M, Dim>;
  using Row = StagedRow<M, Tile>;
  using Entries = RowEntries<Tile, false>;
  using Gradient = float[Tile::kChunks][4];
  static constexpr int kBlocksAtATime = Dim <= 16 ? 2 : 1;  // on a multiprocessor
  static constexpr Shared kKeys = 0, kValues = Tile::kRegion, kCotKeys = 2 * Tile::kRegion, kCotValues = 3 * Tile::kRegion;
  static constexpr Shared kTable = 4 * Tile::kRegion;
  static constexpr uint32_t kShared = kTable + Tile::kTableBytes;
  static constexpr bool kTableGradient = false;
  static constexpr int kRowNumbers = 8;

  int row;  // of the window
  Own query, grad_output, cot_query;
  float base[2], log_sum[2], d[2], r[2], t[2];

  NATTEN_EXT_DEVICE static void run(const NarrowParams& p) {
    const int head = p.head[narrow_launch_head(p)];
    fill_grid_table<Element, Tile>(p, head, kTable);
    for (int index = narrow_block_of_head(p); index < p.tiles; index += p.blocks_per_head) {
      const GridWindow window(p, head, index);
      sync_block();  // shared memory is free again
      stage_pitched<Tile>(p, window, {&p.key, &p.value, &p.cot_key, &p.cot_value});
      copy_async_commit();
      NATTEN_EXT_NO_UNROLL
      for (int i = 0; i < Tile::kGroups; ++i) {
        GridDoubleBackwardQuery gradients;
        gradients.load(p, window, static_cast<int>(narrow_thread() / kWarp) + i * Tile::kWarps);
        if (i == 0) {
          copy_async_wait<0>();
          sync_block();
        }
        gradients.find_numbers(p, window);
        gradients.write_numbers(p, window);
        if (p.grad_query.data != nullptr || p.grad_grad_output.data != nullptr) gradients.find_gradients(p, window);
      }
    }
  }

  NATTEN_EXT_DEVICE void load(const NarrowParams& p, const GridWindow& window, int own_row) {
    row = own_row;
    query.load(p, window, p.query, row);
    grad_output.load(p, window, p.grad_output, row);
    cot_query.load(p, window, p.cot_query, row);
    load_numbers(base, p, window, p.base);
    load_numbers(log_sum, p, window, p.log_sum);
    // D: products of rows of grad_output and output, formed as dP is: the diagonals of two blocks.
    Own output;
    output.load(p, window, p.output, row);
    float c[2][4];
    clear(c);
    const uint32_t g = narrow_lane() / 4;
    NATTEN_EXT_UNROLL
    for (int h = 0; h < 2; ++h) {
      NATTEN_EXT_UNROLL
      for (int i = 0; 2 * i < Tile::kChunks; ++i) {
        grad_output.multiply(c[h], i, output.words[4 * i + h], 2 * i + 1 < Tile::kChunks ? output.words[4 * i + 2 + h] : 0);
      }
      d[h] = shuffle(g % 2 ? c[h][2 * h + 1] : c[h][2 * h], 4 * g + g / 2);
    }
  }

  // What a (batch, heads, queries) array has for the lane's two queries; zeros without an array.
  NATTEN_EXT_DEVICE void load_numbers(float (&numbers)[2], const NarrowParams& p, const GridWindow& window, const void* array) const {
    NATTEN_EXT_UNROLL
    for (int h = 0; h < 2; ++h) {
      const uint64_t at = window.row_index(p, row, narrow_lane() / 4 + 8 * h);
      numbers[h] = array != nullptr ? load_global(static_cast<const float*>(array) + at) : 0;
    }
  }

  // The products of pairs with a row of keys: of S, dP, X and G.
  struct Products {
    float s[2][4], dp[2][4], x[2][4], g[2][4];
  };
  // Numbers of the lane's two queries that are taken off products: these start there.
  struct Start {
    float e[4];
    NATTEN_EXT_DEVICE explicit Start(const float (&off)[2]) : e{forget(-off[0]), forget(-off[0]), forget(-off[1]), forget(-off[1])} {}
    NATTEN_EXT_DEVICE void fill(float (&c)[2][4]) const {
      NATTEN_EXT_UNROLL
      for (int i = 0; i < 8; ++i) c[i / 4][i % 4] = e[i % 4];
    }
  };
  // Adds them to those of dP and G, and finds the others.
  NATTEN_EXT_DEVICE void find_products(Products& of, const Row& keys) const {
    clear(of.s);
    clear(of.x);
    keys.for_each_step(kKeys, [&](int step, int b, uint32_t first, uint32_t second) {
      query.multiply(of.s[b], step, first, second);
      cot_query.multiply(of.x[b], step, first, second);
    });
    keys.for_each_step(kCotKeys, [&](int step, int b, uint32_t first, uint32_t second) { query.multiply(of.x[b], step, first, second); });
    keys.for_each_step(kValues, [&](int step, int b, uint32_t first, uint32_t second) { grad_output.multiply(of.dp[b], step, first, second); });
    keys.for_each_step(kCotValues, [&](int step, int b, uint32_t first, uint32_t second) { grad_output.multiply(of.g[b], step, first, second); });
  }
  NATTEN_EXT_DEVICE float weight(const NarrowParams& p, const Products& products, const Entries& entries, int b, int e) const {
    return weight_of(fused_multiply_add(products.s[b][e], p.factor, entries.of(b, e)), base[e / 2], log_sum[e / 2]);
  }

  // r, t, and D, which lacks what dO * O lost by rounding. Weights sum to 1 up to roundings only, which large X would show.
  NATTEN_EXT_DEVICE void find_numbers(const NarrowParams& p, const GridWindow& window) {
    float sums[5][2];  // over the keys of a query: of P, and of P times dP - D, X, both, and G
    NATTEN_EXT_UNROLL
    for (auto& sum : sums) sum[0] = sum[1] = 0;
    const Start minus_d(d);
    Row keys;
    Shared entries_of = Entries::first(row, kTable);
    NATTEN_EXT_NO_UNROLL
    for (int key_row = 0; key_row < kGridWindow; ++key_row, keys.advance(), entries_of += Entries::kStep) {
      const Entries entries(entries_of);
      Products products;
      minus_d.fill(products.dp);
      clear(products.g);
      find_products(products, keys);
      NATTEN_EXT_UNROLL
      for (int k = 0; k < 8; ++k) {
        const int b = k / 4, e = k % 4, h = e / 2;
        const float weight = this->weight(p, products, entries, b, e), x = products.x[b][e];
        const float weighted = weight * products.dp[b][e];
        sums[0][h] += weight;
        sums[1][h] += weighted;
        sums[2][h] = fused_multiply_add(weight, x, sums[2][h]);
        sums[3][h] = fused_multiply_add(weighted, x, sums[3][h]);
        sums[4][h] = fused_multiply_add(weight, products.g[b][e], sums[4][h]);
      }
    }
    NATTEN_EXT_UNROLL
    for (auto& sum : sums) add_over_columns(sum);
    float y[2];
    load_numbers(y, p, window, p.grad_lse);
    const auto& [mass, of_difference, of_x, of_both, of_g] = sums;
    NATTEN_EXT_UNROLL
    for (int h = 0; h < 2; ++h) {
      const float inverse = reciprocal(mass[h]);
      r[h] = p.scale * of_x[h] * inverse;
      t[h] = (of_g[h] + fused_multiply_add(-of_difference[h], r[h], p.scale * of_both[h])) * inverse;
      d[h] += of_difference[h] - y[h];
    }
  }
  // Of each four lanes, 0 and 1 write D of query 0 and 1, and r if that is asked for; 2 and 3 r and t.
  NATTEN_EXT_DEVICE void write_numbers(const NarrowParams& p, const GridWindow& window) const {
    const int lane = static_cast<int>(narrow_lane()), h = lane % 2, column = lane / 4 + 8 * h;
    const auto of = [&](const float(&numbers)[2]) { return h ? numbers[1] : numbers[0]; };
    if (lane % 4 < 2) {
      store_global(grid_number(p, window, kGridD, row, column), of(d));
      if (p.grad_grad_lse != nullptr) store_global(static_cast<float*>(p.grad_grad_lse) + window.row_index(p, row, column), of(r));
    } else {
      store_global(grid_number(p, window, kGridR, row, column), of(r));
      store_global(grid_number(p, window, kGridT, row, column), of(t));
    }
  }

  NATTEN_EXT_DEVICE void find_gradients(const NarrowParams& p, const GridWindow& window) const {
    Gradient grad_query, grad_grad_output;
    float score_sums[4] = {0, 0, 0, 0}, first_sums[4] = {0, 0, 0, 0}, value_sums[4] = {0, 0, 0, 0};  // of Sb, dS and P (X - r)
    clear(grad_query);
    clear(grad_grad_output);
    const uint32_t ones = pack<Element>(1, 1);
    const Start minus_d(d), minus_t(t);
    Row keys;
    Shared entries_of = Entries::first(row, kTable);
    NATTEN_EXT_NO_UNROLL
    for (int key_row = 0; key_row < kGridWindow; ++key_row, keys.advance(), entries_of += Entries::kStep) {
      const Entries entries(entries_of);
      Products products;
      minus_d.fill(products.dp);
      minus_t.fill(products.g);
      find_products(products, keys);
      NATTEN_EXT_UNROLL
      for (int k = 0; k < 8; ++k) {
        const int b = k / 4, e = k % 4, h = e / 2;
        const float weight = this->weight(p, products, entries, b, e), difference = products.dp[b][e];
        const float deviation = fused_multiply_add(products.x[b][e], p.scale, -r[h]);
        products.g[b][e] = weight * fused_multiply_add(deviation, difference, products.g[b][e]);
        products.dp[b][e] = weight * difference;
        products.x[b][e] = weight * deviation;
        products.s[b][e] = weight;
      }
      uint32_t packed[4];
      pack_weights<Element>(packed, products.g);
      multiply<Element>(score_sums, packed, ones, ones);
      keys.accumulate(grad_query, packed, kKeys);
      pack_weights<Element>(packed, products.dp);
      multiply<Element>(first_sums, packed, ones, ones);
      keys.accumulate(grad_query, packed, kCotKeys);
      pack_weights<Element>(packed, products.x);
      multiply<Element>(value_sums, packed, ones, ones);
      keys.accumulate(grad_grad_output, packed, kValues);
      pack_weights<Element>(packed, products.s);
      keys.accumulate(grad_grad_output, packed, kCotValues);
    }
    // Rows of Sb and of P (X - r) sum to zero, those of dS to y.
    float y[2];
    load_numbers(y, p, window, p.grad_lse);
    subtract_keys(grad_query, {score_sums[0], score_sums[2]}, kKeys, row);
    subtract_keys(grad_query, {first_sums[0] - y[0], first_sums[2] - y[1]}, kCotKeys, row);
    subtract_keys(grad_grad_output, {value_sums[0], value_sums[2]}, kValues, row);
    if (p.grad_query.data != nullptr) write_row<Element>(grad_query, p.scale, p, window, p.grad_query, row);
    if (p.grad_grad_output.data != nullptr) write_row<Element>(grad_grad_output, 1, p, window, p.grad_grad_output, row);
  }
  // Takes what is left over of sums that should be zero, times the keys at the queries' own places, off their results: see
  // subtract_rows in rows.h.
  NATTEN_EXT_DEVICE static void subtract_keys(Gradient& acc, const float (&left_over)[2], Shared region, int row) {
    struct alignas(4) Pair {
      Element e[2];
    };
    const uint32_t lane = narrow_lane();
    NATTEN_EXT_UNROLL
    for (int h = 0; h < 2; ++h) {
      const Shared key = region + row * Tile::kRowBytes + (lane / 4 + 8 * h) * Tile::kPitch + 4 * (lane % 4);
      NATTEN_EXT_UNROLL
      for (int n = 0; n < Tile::kChunks; ++n) {
        const Pair pair = load_shared<Pair>(key + 16 * n);
        NATTEN_EXT_UNROLL
        for (int e = 0; e < 2; ++e) acc[n][2 * h + e] = fused_multiply_add(-left_over[h], widen(pair.e[e]), acc[n][2 * h + e]);
      }
    }
  }
};

template <class M>
bool grid_double_backward_takes(const Params& p, const std::vector<Window>& windows, const Context& context) {
  return narrow_double_backward_takes(p) && grid_takes<M, GridDoubleBackwardQuery>(p, windows, context, GridDoubleBackwardDims<M>{}) &&
         grid_double_backward_key_takes<M>(p, windows, context);
}
template <class M>
bool grid_double_backward(const Params& p, const std::vector<Window>& windows, Context& context) {
  if (!grid_double_backward_takes<M>(p, windows, context)) return false;
  launch_grid<M, GridDoubleBackwardQuery>(p, windows, context, GridDoubleBackwardDims<M>{});
  if (p.grad_key.data != nullptr || p.grad_value.data != nullptr || p.table_gradient) grid_double_backward_key<M>(p, windows, context);
  return true;
}

template bool grid_double_backward<NATTEN_EXT_MODE>(const Params&, const std::vector<Window>&, Context&);
template bool grid_double_backward_takes<NATTEN_EXT_MODE>(const Params&, const std::vector<Window>&, const Context&);

}  // namespace natten_ext::cuda
