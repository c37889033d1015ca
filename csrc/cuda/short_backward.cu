// Backward of short sequences (short.h), both sides in one kernel: scores, weights P and their gradients dS are computed once. A warp
// has a group of queries, and leaves P and dS in shared memory, rounded as they are for products; then it has a group of keys.
// backward.cu says what corrects D.
#include "short_launch.h"

namespace natten_ext::cuda {

template <class M, int Dim>
struct ShortBackward {
  using Tile = ShortTile<M, Dim>;
  static constexpr Shared kQueries = 0, kKeys = Tile::kRegion, kValues = 2 * Tile::kRegion, kGradOutputs = 3 * Tile::kRegion;
  static constexpr Shared kOutputs = 4 * Tile::kRegion, kWeights = 5 * Tile::kRegion, kGradients = kWeights + Tile::kPairs;
  static constexpr Shared kHalfNorms = kGradients + Tile::kPairs;  // of keys
  static constexpr uint32_t kShared = kHalfNorms + Tile::kNumbers;
  static constexpr int kBlocksAtATime = short_blocks_at_a_time(kShared, 3);

  NATTEN_EXT_DEVICE static void run(const ShortParams& p) {
    const ShortGroup<M, Dim> group(p);
    stage_sequence<M, Dim>(p, {&p.query, &p.key}, {kQueries, kKeys});
    copy_async_commit();
    stage_sequence<M, Dim>(p, {&p.value, &p.grad_output, &p.output}, {kValues, kGradOutputs, kOutputs});
    copy_async_commit();
    float base[2], log_sum[2], y[2];
    group.load_numbers(base, p, p.base);
    group.load_numbers(log_sum, p, p.log_sum);
    group.load_numbers(y, p, p.grad_lse);
    copy_async_wait<1>();
    sync_block();

    float half_norm[2], d[2];
    prepare_norms(half_norm, kHalfNorms, p, group, {kQueries, kQueries}, {kKeys, kKeys}, 0.5f, kInfinity<float>);
    ShortPairs weights, gradients;
    clear(weights);
    add_products(weights, kQueries, kKeys, group);
    copy_async_wait<0>();
    sync_block();

    finish_pairs(weights, p.factor, half_norm, kHalfNorms);
    row_products<M, Dim>(d, kGradOutputs, kOutputs, group);
    clear(gradients);
    add_products(gradients, kGradOutputs, kValues, group);
    float lacking[2] = {0, 0};
    NATTEN_EXT_UNROLL
    for (int i = 0; i < 4 * kShortBlocks; ++i) {
      const int h = i / 2 % 2;
      float &weight = weights[i / 4][i % 4], &gradient = gradients[i / 4][i % 4];
      weight = weight_of(weight, base[h], log_sum[h]);
      gradient -= d[h];
      lacking[h] = fused_multiply_add(weight, gradient, lacking[h]);
    }
    add_over_columns(lacking);
    // Rows of dS sum to y.
    NATTEN_EXT_UNROLL
    for (int b = 0; b < kShortBlocks; ++b) {
      NATTEN_EXT_UNROLL
      for (int e = 0; e < 4; ++e) gradients[b][e] = weights[b][e] * (gradients[b][e] - (lacking[e / 2] - y[e / 2]));
      group.store(kWeights, b, weights[b]);
      group.store(kGradients, b, gradients[b]);
    }
    write_queries(p, group, gradients, y);
    sync_block();
    write_keys(p, group);
  }

  NATTEN_EXT_DEVICE static void write_queries(const ShortParams& p, const ShortGroup<M, Dim>& group, const ShortPairs& gradients, const float (&y)[2]) {
    if (p.grad_query.data == nullptr) return;
    ShortSums<M, Dim> grad_query;
    float left_over[2];
    grad_query.add(left_over, HeldPairs<M>(gradients), kKeys);
    for (int h = 0; h < 2; ++h) left_over[h] -= y[h];
    grad_query.subtract(left_over, kKeys, group);
    if (p.l2 && p.grad_lse != nullptr) grad_query.subtract(y, kQueries, group);
    sync_warp();
    group.write(grad_query.acc, {p.scale, p.scale}, p, p.grad_query, kOutputs);
  }

  // Once all groups of queries have left their pairs. Keys and values are needed no more but by the group that has them.
  NATTEN_EXT_DEVICE static void write_keys(const ShortParams& p, const ShortGroup<M, Dim>& group) {
    if (p.grad_value.data != nullptr) {
      ShortSums<M, Dim> grad_value;
      grad_value.add(StoredPairs<M, Dim, true>(kWeights, group), kGradOutputs);
      group.write(grad_value.acc, {1, 1}, p, p.grad_value, kValues);
    }
    if (p.grad_key.data != nullptr) {
      ShortSums<M, Dim> grad_key;
      float sums[2];
      grad_key.add(sums, StoredPairs<M, Dim, true>(kGradients, group), kQueries);
      if (p.l2) grad_key.subtract(sums, kKeys, group);
      sync_warp();
      group.write(grad_key.acc, {p.scale, p.scale}, p, p.grad_key, kKeys);
    }
  }
};

template <class M>
bool short_backward(const Params& p, Context& context) {
  return launch_short<M, ShortBackward>(p, context);
}
template <class M>
bool short_backward_takes(const Params& p, const Context& context) {
  return short_takes<M, ShortBackward>(p, context);
}

template bool short_backward<NATTEN_EXT_MODE>(const Params&, Context&);
template bool short_backward_takes<NATTEN_EXT_MODE>(const Params&, const Context&);

}  // namespace natten_ext::cuda
