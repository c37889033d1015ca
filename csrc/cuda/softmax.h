// The running softmax of a lane's two rows, whose columns are spread over four lanes.
#pragma once

#include "kernel.h"

namespace natten_ext::cuda {

// Weights are 2^(score - base). The base follows the largest score only when that is kSlack or more above it, which is
// rare: until then weights may be as large as 2^kSlack, and nothing is rescaled (as in FlashAttention-4).
template <class Real>
struct RunningSoftmax {
  static constexpr Real kSlack = 8;
  Real base[2] = {-kInfinity<Real>, -kInfinity<Real>};
  Real from[2] = {0, 0};  // the base, but 0 as long as no key was met
  Real sum[2] = {0, 0};   // of the lane's own columns

  // Turns scores into weights.
  template <class Pairs, int N>
  NATTEN_EXT_DEVICE void update(const Pairs& pairs, Scores<Real>& s, Real (&acc)[N][4]) {
    Real largest[2] = {-kInfinity<Real>, -kInfinity<Real>};
    pairs.for_each_block([&](int b, const auto&) {
      NATTEN_EXT_UNROLL
      for (int h = 0; h < 2; ++h) largest[h] = larger(largest[h], larger(s[b][2 * h], s[b][2 * h + 1]));
    });
    if (any_in_warp(largest[0] > base[0] + kSlack || largest[1] > base[1] + kSlack)) raise(largest, acc);
    pairs.for_each_block([&](int b, const auto&) {
      NATTEN_EXT_UNROLL
      for (int e = 0; e < 4; ++e) {
        s[b][e] = power_of_two(s[b][e] - from[e / 2]);
        sum[e / 2] += s[b][e];
      }
    });
  }

  // The rows' whole sums.
  NATTEN_EXT_DEVICE void finish() {
    NATTEN_EXT_UNROLL
    for (int h = 0; h < 2; ++h) {
      sum[h] += shuffle_xor(sum[h], 1);
      sum[h] += shuffle_xor(sum[h], 2);
    }
  }
  NATTEN_EXT_DEVICE Real log_sum(int h) const { return binary_logarithm(sum[h]); }

 private:
  template <int N>
  NATTEN_EXT_DEVICE void raise(Real (&largest)[2], Real (&acc)[N][4]) {
    NATTEN_EXT_UNROLL
    for (int h = 0; h < 2; ++h) {
      largest[h] = larger(largest[h], shuffle_xor(largest[h], 1));
      largest[h] = larger(largest[h], shuffle_xor(largest[h], 2));
      const Real next = larger(base[h], largest[h]);
      const Real factor = base[h] == -kInfinity<Real> ? Real(0) : power_of_two(base[h] - next);
      base[h] = next;
      from[h] = next == -kInfinity<Real> ? Real(0) : next;
      sum[h] *= factor;
      NATTEN_EXT_UNROLL
      for (int n = 0; n < N; ++n) {
        acc[n][2 * h] *= factor;
        acc[n][2 * h + 1] *= factor;
      }
    }
  }
};

}  // namespace natten_ext::cuda
