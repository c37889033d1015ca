// Double backward of short sequences (short.h), both sides in one kernel, in one pass: a warp has P, X and dP of a group of queries with
// all keys in registers. It leaves what the gradients are sums of in shared memory, rounded as it is for products; then it has
// a group of keys. With Y = X - r, C = dP - D and Z = Y C + G, t is the mean of Z, and Sb = P (Z - t); so products that make G start at Y C.
#include "short_launch.h"

namespace natten_ext::cuda {

template <class M, int Dim>
struct ShortDoubleBackward {
  using Tile = ShortTile<M, Dim>;
  using Group = ShortGroup<M, Dim>;
  using OfQueries = StoredPairs<M, Dim, false>;
  using OfKeys = StoredPairs<M, Dim, true>;
  static constexpr Shared region(int tensor) { return tensor * Tile::kRegion; }
  static constexpr Shared kQueries = region(0), kKeys = region(1), kCotQueries = region(2), kCotKeys = region(3), kValues = region(4);
  static constexpr Shared kGradOutputs = region(5), kOutputs = region(6), kCotValues = region(7);
  // Sb, dS, P Y, and P: where rows are as long as those of outputs, in their place, since each group needs its own only.
  static constexpr Shared kScores = region(8), kGradients = kScores + Tile::kPairs, kDeviations = kGradients + Tile::kPairs;
  static constexpr bool kInPlace = Tile::kPairRow == Tile::kRow;
  static constexpr Shared kWeights = kInPlace ? kOutputs : kDeviations + Tile::kPairs;
  // Of keys: |k|^2 / 2, and gK.k.
  static constexpr Shared kHalfNorms = kDeviations + (kInPlace ? 1 : 2) * Tile::kPairs, kCotProducts = kHalfNorms + Tile::kNumbers;
  static constexpr uint32_t kShared = kCotProducts + Tile::kNumbers;
  static constexpr int kBlocksAtATime = short_blocks_at_a_time(kShared, 2);

  NATTEN_EXT_DEVICE static void run(const ShortParams& p) {
    const Group group(p);
    stage_sequence<M, Dim>(p, {&p.query, &p.key, &p.cot_query, &p.cot_key}, {kQueries, kKeys, kCotQueries, kCotKeys});
    copy_async_commit();
    stage_sequence<M, Dim>(p, {&p.value, &p.grad_output, &p.output, &p.cot_value}, {kValues, kGradOutputs, kOutputs, kCotValues});
    copy_async_commit();
    float y[2];
    attend(p, group, y);
    sync_warp();
    write_queries(p, group, y);
    sync_block();
    write_keys(p, group);
  }

  // Leaves the group's pairs in shared memory. `y`: what it finds of that.
  NATTEN_EXT_DEVICE static void attend(const ShortParams& p, const Group& group, float (&y)[2]) {
    float base[2], log_sum[2], half_norm[2], cot_product[2];
    group.load_numbers(base, p, p.base);
    group.load_numbers(log_sum, p, p.log_sum);
    copy_async_wait<1>();
    sync_block();
    prepare_norms(half_norm, kHalfNorms, p, group, {kQueries, kQueries}, {kKeys, kKeys}, 0.5f, kInfinity<float>);
    prepare_norms(cot_product, kCotProducts, p, group, {kCotQueries, kQueries}, {kCotKeys, kKeys}, 1, 0);
    ShortPairs weights, x, c;
    clear(weights);
    add_products(weights, kQueries, kKeys, group);
    sync_block();
    finish_pairs(weights, p.factor, half_norm, kHalfNorms);
    NATTEN_EXT_UNROLL
    for (int i = 0; i < 4 * kShortBlocks; ++i) {
      float& weight = weights[i / 4][i % 4];
      weight = weight_of(weight, base[i / 2 % 2], log_sum[i / 2 % 2]);
    }
    clear(x);
    add_products(x, kCotQueries, kKeys, group);
    add_products(x, kQueries, kCotKeys, group);
    copy_async_wait<0>();
    sync_block();

    finish_pairs(x, p.scale, cot_product, kCotProducts);
    clear(c);
    add_products(c, kGradOutputs, kValues, group);
    float d[2];
    row_products<M, Dim>(d, kGradOutputs, kOutputs, group);
    sync_warp();  // weights may come in the place of outputs
    float mass[2] = {0, 0}, lacking[2] = {0, 0}, r[2] = {0, 0}, t[2] = {0, 0};
    NATTEN_EXT_UNROLL
    for (int i = 0; i < 4 * kShortBlocks; ++i) {
      const int h = i / 2 % 2;
      const float weight = weights[i / 4][i % 4];
      c[i / 4][i % 4] -= d[h];
      mass[h] += weight;
      lacking[h] = fused_multiply_add(weight, c[i / 4][i % 4], lacking[h]);
      r[h] = fused_multiply_add(weight, x[i / 4][i % 4], r[h]);
    }
    add_over_columns(mass);
    add_over_columns(lacking);
    add_over_columns(r);
    // Weights sum to 1 up to roundings only, which large X would show.
    const float inverse[2] = {1 / mass[0], 1 / mass[1]};
    for (int h = 0; h < 2; ++h) {
      r[h] *= inverse[h];
      if (p.grad_grad_lse != nullptr && narrow_lane() % 4 == 0 && group.exists[h]) {
        store_global(static_cast<float*>(p.grad_grad_lse) + group.number_index(p, h), r[h]);
      }
    }
    group.load_numbers(y, p, p.grad_lse);  // so late that it needs no registers before
    // Z takes the place of C. Rows of dS sum to y.
    NATTEN_EXT_UNROLL
    for (int b = 0; b < kShortBlocks; ++b) {
      float gradients[4];
      NATTEN_EXT_UNROLL
      for (int e = 0; e < 4; ++e) {
        float &centred = c[b][e], &deviation = x[b][e];
        centred -= lacking[e / 2] - y[e / 2];
        deviation -= r[e / 2];
        gradients[e] = weights[b][e] * centred;
        centred *= deviation;
        deviation *= weights[b][e];
      }
      group.store(kGradients, b, gradients);
      group.store(kDeviations, b, x[b]);
      group.store(kWeights, b, weights[b]);
    }
    add_products(c, kGradOutputs, kCotValues, group);
    NATTEN_EXT_UNROLL
    for (int i = 0; i < 4 * kShortBlocks; ++i) t[i / 2 % 2] = fused_multiply_add(weights[i / 4][i % 4], c[i / 4][i % 4], t[i / 2 % 2]);
    add_over_columns(t);
    for (int h = 0; h < 2; ++h) t[h] *= inverse[h];
    NATTEN_EXT_UNROLL
    for (int b = 0; b < kShortBlocks; ++b) {
      NATTEN_EXT_UNROLL
      for (int e = 0; e < 4; ++e) c[b][e] = weights[b][e] * (c[b][e] - t[e / 2]);
      group.store(kScores, b, c[b]);
    }
  }

  // Rows of Sb and of P Y sum to zero, those of dS to y.
  NATTEN_EXT_DEVICE static void write_queries(const ShortParams& p, const Group& group, const float (&y)[2]) {
    float left_over[2];
    if (p.grad_grad_output.data != nullptr) {
      ShortSums<M, Dim> grad_grad_output;
      grad_grad_output.add(left_over, OfQueries(kDeviations, group), kValues);
      grad_grad_output.add(OfQueries(kWeights, group), kCotValues);
      grad_grad_output.subtract(left_over, kValues, group);
      sync_warp();
      group.write(grad_grad_output.acc, {1, 1}, p, p.grad_grad_output, kOutputs);
    }
    if (p.grad_query.data != nullptr) {
      ShortSums<M, Dim> grad_query;
      grad_query.add(left_over, OfQueries(kScores, group), kKeys);
      grad_query.subtract(left_over, kKeys, group);
      grad_query.add(left_over, OfQueries(kGradients, group), kCotKeys);
      for (int h = 0; h < 2; ++h) left_over[h] -= y[h];
      grad_query.subtract(left_over, kCotKeys, group);
      if (p.l2 && p.grad_lse != nullptr) grad_query.subtract(y, kCotQueries, group);
      sync_warp();
      group.write(grad_query.acc, {p.scale, p.scale}, p, p.grad_query, kOutputs);
    }
  }

  // Once all groups of queries have left their pairs. Keys and values are needed no more but by the group that has them.
  NATTEN_EXT_DEVICE static void write_keys(const ShortParams& p, const Group& group) {
    if (p.grad_value.data != nullptr) {
      ShortSums<M, Dim> grad_value;
      grad_value.add(OfKeys(kDeviations, group), kGradOutputs);
      group.write(grad_value.acc, {1, 1}, p, p.grad_value, kValues);
    }
    if (p.grad_key.data != nullptr) {
      ShortSums<M, Dim> grad_key;
      float sums[2];
      grad_key.add(sums, OfKeys(kScores, group), kQueries);
      if (p.l2) grad_key.subtract(sums, kKeys, group);
      grad_key.add(sums, OfKeys(kGradients, group), kCotQueries);
      if (p.l2) grad_key.subtract(sums, kCotKeys, group);
      sync_warp();
      group.write(grad_key.acc, {p.scale, p.scale}, p, p.grad_key, kKeys);
    }
  }
};

template <class M>
bool short_double_backward(const Params& p, Context& context) {
  return narrow_double_backward_takes(p) && launch_short<M, ShortDoubleBackward>(p, context);
}
template <class M>
bool short_double_backward_takes(const Params& p, const Context& context) {
  return narrow_double_backward_takes(p) && short_takes<M, ShortDoubleBackward>(p, context);
}

template bool short_double_backward<NATTEN_EXT_MODE>(const Params&, Context&);
template bool short_double_backward_takes<NATTEN_EXT_MODE>(const Params&, const Context&);

}  // namespace natten_ext::cuda
