// Sums over keys of a block of queries: of weights[key][lane] times rows of a key-side operand.
#pragma once

#include "dense.h"

namespace natten_ext::NATTEN_EXT_ISA {

// Held as rows [query][padded channels] or, where padding would cost more than a transpose, as [channel][lane]. Every
// number is added up in the same order in both. Zero until something is added.
template <class T>
class QuerySums {
 public:
  QuerySums(const DensePlan<T>& plan, bool wanted)
      : plan_(plan), by_lane_(saves_by_lane(plan)), rows_(wanted ? plan.block_queries * plan.padded : 0) {
    if (wanted && by_lane_) by_lanes_ = Buffer<T>(plan.padded * plan.block_queries);
    if (wanted) std::fill_n((by_lane_ ? by_lanes_ : rows_).data(), plan.block_queries * plan.padded, T(0));
  }

  // Adds the products of some keys, or begins with them. `weights` has whole vectors of lanes.
  void add(const T* weights, int64_t count, int64_t keys, const T* operand, bool more) {
    const int64_t lanes = round_up_to_lanes<T>(count), padded = plan_.padded;
    if (by_lane_) gemm<T>(plan_.channels, lanes, keys, {operand, 1, padded}, weights, lanes, by_lanes_, lanes, more);
    else gemm<T>(count, padded, keys, {weights, 1, lanes}, operand, padded, rows_, padded, more);
  }
  // Multiplies the sums of each query by a factor.
  void scale(const T* factors, int64_t count) {
    const int64_t lanes = round_up_to_lanes<T>(count), padded = plan_.padded;
    if (by_lane_) {
      for (int64_t lane = 0; lane < lanes; lane += kLanes<T>) {
        const Vector<T> factor = load(factors + lane);
        for (int64_t c = 0; c < plan_.channels; ++c) {
          T* sum = by_lanes_ + c * lanes + lane;
          store(sum, load(sum) * factor);
        }
      }
      return;
    }
    for (int64_t i = 0; i < count; ++i) {
      if (factors[i] == 1) continue;
      T* row = rows_ + i * padded;
      for (int64_t c = 0; c < padded; c += kLanes<T>) store(row + c, load(row + c) * factors[i]);
    }
  }
  // The sums as rows. Nothing may be added after that.
  T* rows(int64_t count) {
    const int64_t lanes = round_up_to_lanes<T>(count);
    if (by_lane_) transpose(rows_.data(), plan_.padded, by_lanes_.data(), lanes, plan_.padded, lanes);
    return rows_;
  }
  // The sums as [channel][lane], in `other` if they are not held so; of lanes without a query they are anything.
  const T* by_lanes(int64_t count, T* other) {
    const int64_t lanes = round_up_to_lanes<T>(count), padded = plan_.padded;
    if (by_lane_) return by_lanes_;
    std::fill(rows_ + count * padded, rows_ + lanes * padded, T(0));
    transpose(other, lanes, rows_.data(), padded, lanes, padded);
    return other;
  }

 private:
  static bool saves_by_lane(const DensePlan<T>& plan) {
    const int64_t lanes = round_up_to_lanes<T>(plan.queries), rows = plan.queries * plan.padded * plan.keys;
    return rows - lanes * plan.channels * plan.keys > rows / 8 + 3 * lanes * plan.padded;
  }

  const DensePlan<T>& plan_;
  const bool by_lane_;
  Buffer<T> rows_, by_lanes_;
};

}  // namespace natten_ext::NATTEN_EXT_ISA
