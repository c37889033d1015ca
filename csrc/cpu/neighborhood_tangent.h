// Tangent of neighborhood attention; the formulas are those of dense_tangent.h, whole rows at hand.
#pragma once

#include "neighborhood_saved.h"

namespace natten_ext::NATTEN_EXT_ISA {

template <class T>
class NeighborhoodTangent {
 public:
  static constexpr int L = kLanes<T>;

  explicit NeighborhoodTangent(const Arguments& a)
      : a_(a), moves_(a.cot_query || a.cot_key || a.cot_bias), rows_(a, 0, true), cotangents_(a) {
    tangent_.resize(a.problem.head_dim);
  }

  void run(const NeighborhoodJob& job) {
    const ClassGeometry<T>& g = rows_.geometry;
    if (rows_.start(job)) {
      saved_.resize(g);
      cotangents_.resize(rows_);
      for (StripWeights<T>* weights : {&probability_, &x_}) weights->resize(g);
    }
    cotangents_.start(rows_);
    for_each_group(g, job.planes, job.rows, [&](const RowGroup& group) {
      rows_.load_queries(group);
      saved_.load(rows_, group);
      cotangents_.load_queries(rows_, group);
      rows_.load_keys(group, [&](Row row) { cotangents_.load_keys(rows_, row); });
      g.for_each_strip([&](int64_t begin, int64_t end) { strip(group, begin, end); });
    });
  }

 private:
  void strip(const RowGroup& group, int64_t begin, int64_t end) {
    const ClassGeometry<T>& g = rows_.geometry;
    score_strip(g, group, begin, end, rows_.query, rows_.key, rows_.score_channels, probability_, false, rows_.table());
    cotangents_.products(rows_, group, begin, end, x_);
    for (int64_t b = begin; b < end; ++b) {
      for (int r = 0; r < group.count; ++r) weigh(group, r, b, b - begin);
    }
    const auto gather = [&](const StripWeights<T>& weights, const RowRing<T>& value, bool add) {
      gather_keys<T>(g, group, begin, end, weights, value, rows_.channels, terms_, tangent_, add);
    };
    if (a_.cot_value) gather(probability_, cotangents_.value, false);
    if (moves_) gather(x_, rows_.value, static_cast<bool>(a_.cot_value));
    for (int64_t b = begin; a_.grad_grad_output && b < end; ++b) {
      for (int r = 0; r < group.count; ++r) {
        rows_.transposer.unload(tangent_.row(b - begin, r), L, a_.grad_grad_output, rows_.job, group.row(r), b, broadcast(T(1)));
      }
    }
  }

  // Scores of one block of queries to P, and X to P (X - r).
  void weigh(const RowGroup& group, int r, int64_t b, int64_t slot) {
    const ClassGeometry<T>& g = rows_.geometry;
    const int64_t n = group.key_rows(r) * g.kx * L, of_plane = group.rows(r) * g.kx * L;
    T* const probabilities = probability_.block(r, slot);
    T* const values = x_.block(r, slot);
    const Vector<T> base = load(saved_.base[r] + b * L), log_sum = load(saved_.log_sum[r] + b * L);
    Vector<T> mean{}, rest{};  // r in two parts
    for (int64_t z = group.planes.start, from = 0; z < group.planes.end; ++z, from += of_plane) {
      const T* const table = cotangents_.table(g.query_blocks[b].table, group, r, z);
      for (int64_t i = 0; i < of_plane; i += L) {
        const Vector<T> probability = exp2(load(probabilities + from + i) - base - log_sum);
        store(probabilities + from + i, probability);
        if (!moves_) continue;
        const Vector<T> value = cotangents_.read(values + from, table, i);
        mean += probability * value;
        store(values + from + i, value);
      }
    }
    for (int64_t i = 0; moves_ && i < n; i += L) rest += load(probabilities + i) * (load(values + i) - mean);
    if (a_.grad_grad_lse) rows_.store_lanes(a_.grad_grad_lse, group.row(r), b, mean + rest);
    if (!moves_) return;
    for (int64_t i = 0; i < n; i += L) store(values + i, load(probabilities + i) * (load(values + i) - mean - rest));
  }

  const Arguments& a_;
  const bool moves_;  // whether scores have a tangent
  NeighborhoodRows<T> rows_;
  SavedRows<T> saved_;
  CotangentRows<T> cotangents_;
  StripWeights<T> probability_, x_;
  StripResults<T> tangent_;  // zero where no tangent is given
  std::vector<Term<T>> terms_;
};

template <class T>
void neighborhood_tangent(const Arguments& a, HeadRange heads) {
  run_neighborhood_queries<T>(a.problem, heads, kTangent, [&] { return NeighborhoodTangent<T>(a); });
}

}  // namespace natten_ext::NATTEN_EXT_ISA
