// Forward of short sequences (short.h). A warp has the scores of a group with all keys in registers: it takes the largest, then
// exponentials, sums and the product with the values.
#include "short_launch.h"

namespace natten_ext::cuda {

template <class M, int Dim>
struct ShortForward {
  using Tile = ShortTile<M, Dim>;
  static constexpr Shared kQueries = 0, kKeys = Tile::kRegion, kValues = 2 * Tile::kRegion, kHalfNorms = 3 * Tile::kRegion;  // of keys
  static constexpr uint32_t kShared = kHalfNorms + Tile::kNumbers;
  static constexpr int kBlocksAtATime = short_blocks_at_a_time(kShared, 3);

  NATTEN_EXT_DEVICE static void run(const ShortParams& p) {
    const ShortGroup<M, Dim> group(p);
    stage_sequence<M, Dim>(p, {&p.query, &p.key}, {kQueries, kKeys});
    copy_async_commit();
    stage_sequence<M, Dim>(p, {&p.value}, {kValues});
    copy_async_commit();
    copy_async_wait<1>();
    sync_block();

    float half_norm[2];
    prepare_norms(half_norm, kHalfNorms, p, group, {kQueries, kQueries}, {kKeys, kKeys}, 0.5f, kInfinity<float>);
    ShortPairs weights;
    clear(weights);
    add_products(weights, kQueries, kKeys, group);
    copy_async_wait<0>();
    sync_block();

    finish_pairs(weights, p.factor, half_norm, kHalfNorms);
    float base[2], sum[2];
    take_weights(weights, base, sum);
    ShortSums<M, Dim> output;
    output.add(HeldPairs<M>(weights), kValues);
    group.write(output.acc, {reciprocal(sum[0]), reciprocal(sum[1])}, p, p.output, kQueries);
    NATTEN_EXT_UNROLL
    for (int h = 0; h < 2; ++h) {
      if (narrow_lane() % 4 != 0 || !group.exists[h]) continue;
      const uint64_t row = group.number_index(p, h);
      const float log_sum = quick_logarithm(sum[h]);
      store_global(static_cast<float*>(p.base) + row, base[h]);
      store_global(static_cast<float*>(p.log_sum) + row, log_sum);
      if (p.natural_lse != nullptr) store_global(static_cast<float*>(p.natural_lse) + row, (base[h] + log_sum) / kLog2E<float>);
    }
  }

  // Turns scores into weights that are counted from the largest, the base.
  NATTEN_EXT_DEVICE static void take_weights(ShortPairs& scores, float (&base)[2], float (&sum)[2]) {
    NATTEN_EXT_UNROLL
    for (int h = 0; h < 2; ++h) {
      base[h] = -kInfinity<float>;
      NATTEN_EXT_UNROLL
      for (auto& block : scores) base[h] = larger(base[h], larger(block[2 * h], block[2 * h + 1]));
      base[h] = larger(base[h], shuffle_xor(base[h], 1));
      base[h] = larger(base[h], shuffle_xor(base[h], 2));
      const float from = base[h] == -kInfinity<float> ? 0 : base[h];
      sum[h] = 0;
      NATTEN_EXT_UNROLL
      for (int i = 0; i < 2 * kShortBlocks; ++i) {
        float& weight = scores[i / 2][2 * h + i % 2];
        weight = power_of_two(weight - from);
        sum[h] += weight;
      }
    }
    add_over_columns(sum);
  }
};

template <class M>
bool short_forward(const Params& p, Context& context) {
  return launch_short<M, ShortForward>(p, context);
}

template bool short_forward<NATTEN_EXT_MODE>(const Params&, Context&);

}  // namespace natten_ext::cuda
