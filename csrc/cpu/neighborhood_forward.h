// Forward of neighborhood attention: a plain softmax over each window, one query per lane.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "neighborhood_products.h"

namespace natten_ext::NATTEN_EXT_ISA {

template <class T>
class NeighborhoodForward {
 public:
  static constexpr int L = kLanes<T>;

  explicit NeighborhoodForward(const Arguments& a) : a_(a), rows_(a, 0, false) { output_.resize(a.problem.head_dim); }

  void run(const NeighborhoodJob& job) {
    const ClassGeometry<T>& g = rows_.geometry;
    if (rows_.start(job)) weights_.resize(g);
    for_each_group(g, job.planes, job.rows, [&](const RowGroup& group) {
      rows_.load_queries(group);
      rows_.load_keys(group, [](Row) {});
      g.for_each_strip([&](int64_t begin, int64_t end) { strip(group, begin, end); });
    });
  }

 private:
  void strip(const RowGroup& group, int64_t begin, int64_t end) {
    const ClassGeometry<T>& g = rows_.geometry;
    score_strip(g, group, begin, end, rows_.query, rows_.key, rows_.score_channels, weights_, false, rows_.table());
    for (int64_t b = begin; b < end; ++b) {
      for (int r = 0; r < group.count; ++r) inverse_sum_[b - begin][r] = softmax(group, r, b, weights_.block(r, b - begin));
    }
    gather_keys<T>(g, group, begin, end, weights_, rows_.value, rows_.channels, terms_, output_, false);
    for (int64_t b = begin; b < end; ++b) {
      for (int r = 0; r < group.count; ++r) {
        rows_.transposer.unload(output_.row(b - begin, r), L, a_.output, rows_.job, group.row(r), b, inverse_sum_[b - begin][r]);
      }
    }
  }

  // Scores of one block of queries to exponentials; writes lse and returns the inverse of their sums.
  Vector<T> softmax(const RowGroup& group, int r, int64_t b, T* weights) {
    const ClassGeometry<T>& g = rows_.geometry;
    const int64_t n = group.key_rows(r) * g.kx;
    Vector<T> top = broadcast<T>(-std::numeric_limits<T>::infinity());
    for (int64_t i = 0; i < n; ++i) top = maximum<T>(top, load(weights + i * L));
    Vector<T> sums[2] = {};  // two, because additions take longer than they keep the units busy
    int64_t i = 0;
    for (; i + 2 <= n; i += 2) {
      for (int k = 0; k < 2; ++k) {
        const Vector<T> e = exp2(load(weights + (i + k) * L) - top);
        sums[k] += e;
        store(weights + (i + k) * L, e);
      }
    }
    for (; i < n; ++i) {
      const Vector<T> e = exp2(load(weights + i * L) - top);
      sums[0] += e;
      store(weights + i * L, e);
    }
    const Vector<T> sum = sums[0] + sums[1];
    rows_.store_lanes(rows_.lse_part(0), group.row(r), b, top);
    rows_.store_lanes(rows_.lse_part(1), group.row(r), b, log2(sum));
    return 1 / sum;
  }

  const Arguments& a_;
  NeighborhoodRows<T> rows_;
  StripWeights<T> weights_;
  StripResults<T> output_;
  Vector<T> inverse_sum_[kStrip][kGroup];
  std::vector<Term<T>> terms_;
};

template <class T>
void neighborhood_forward(const Arguments& a, HeadRange heads) {
  run_neighborhood_queries<T>(a.problem, heads, kForward, [&] { return NeighborhoodForward<T>(a); });
}

}  // namespace natten_ext::NATTEN_EXT_ISA
