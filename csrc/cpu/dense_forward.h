// Forward of the dense kernels: online softmax over blocks of keys.
#pragma once

#include "dense_query_sums.h"
#include "dense_tasks.h"
#include "dense_windows.h"
#include "neighborhood_forward.h"

namespace natten_ext::NATTEN_EXT_ISA {

template <class T>
class DenseForward {
 public:
  DenseForward(const Arguments& a, const DensePlan<T>& plan, const DenseTables<T>& tables)
      : a_(a),
        plan_(plan),
        tables_(tables),
        windows_(a, plan),
        key_origin_(a.key, a.problem, plan.key_heads()),
        key_(a.key, plan, &key_origin_),
        value_(a.value, plan),
        index_(plan, tables.head(plan.heads.first) != nullptr),
        query_(plan.block_queries * plan.padded),
        query_t_(plan.padded * plan.block_queries),
        scores_(plan.block_keys * plan.block_queries),
        output_(plan, true),
        maximum_(plan.block_queries),
        sum_(plan.block_queries),
        log_sum_(plan.block_queries),
        correction_(plan.block_queries),
        key_bias_(plan.block_keys) {}

  // Queries [begin, end) of one job.
  void run(const DenseJob& job, int64_t begin, int64_t end) {
    if (windows_.run(job)) return;
    key_.start(job);
    value_.start(job);
    for (int64_t first = begin; first < end; first += plan_.block_queries) {
      block(job, first, std::min(plan_.block_queries, end - first));
    }
  }

  void prefetch(const DenseJob& job) const {
    for (const View* v : {&a_.query, &a_.key, &a_.value}) prefetch_rows(*v, plan_, job);
  }

 private:
  void block(const DenseJob& job, int64_t first, int64_t count) {
    const int64_t lanes = round_up_to_lanes<T>(count), padded = plan_.padded;
    const Problem& p = a_.problem;
    const T* table = tables_.head(job.head);
    pack_queries<T>(query_, query_t_, a_.query, plan_, job, first, count, T(p.dot_scale()) * kLog2E<T>,
                    p.l2 ? key_.origin() : nullptr);
    if (table != nullptr) index_.start(first, count);
    // Not minus infinity, which rows may meet alone for a while: exp2(-inf - -inf) is NaN.
    std::fill(maximum_.data(), maximum_ + lanes, std::numeric_limits<T>::lowest());
    std::fill(sum_.data(), sum_ + lanes, T(0));
    for (int64_t k = 0; k < plan_.keys; k += plan_.block_keys) {
      const int64_t keys = std::min(plan_.block_keys, plan_.keys - k);
      const T* key = key_.block(k, keys);
      gemm<T>(keys, lanes, plan_.channels, {key, padded, 1}, query_t_, lanes, scores_, lanes, false);
      if (p.l2) l2_key_bias<T>(key_bias_, key, keys, plan_, p.scale);
      for (int64_t lane = 0; lane < lanes; lane += kLanes<T>) softmax(table, k, keys, lanes, lane, p.l2);
      if (k > 0) output_.scale(correction_, count);
      output_.add(scores_, count, keys, value_.block(k, keys), k > 0);
    }
    for (int64_t lane = 0; lane < lanes; lane += kLanes<T>) store(log_sum_ + lane, log2(load(sum_ + lane)));
    const T* output = output_.rows(count);
    RowCursor row(a_.output, job, plan_.window_x, first), lse = lse_cursor(p, job, plan_.window_x, first);
    for (int64_t i = 0; i < count; ++i, ++row, ++lse) {
      store_row(output + i * padded, a_.output, row.offset, plan_.channels, 1 / sum_[i]);
      T* to = static_cast<T*>(a_.lse) + lse.offset;
      to[0] = maximum_[i];
      to[p.rows()] = log_sum_[i];
    }
  }

  // One vector of queries: adds the biases, moves the running maximum, and leaves exponentials in the block.
  NATTEN_EXT_INLINE void softmax(const T* table, int64_t first_key, int64_t keys, int64_t lanes, int64_t lane, bool l2) {
    T* scores = scores_ + lane;
    const Vector<T> before = load(maximum_ + lane);
    Vector<T> top = before;
    for (int64_t j = 0; j < keys; ++j) {
      Vector<T> s = load(scores + j * lanes);
      if (table != nullptr) s += index_.read(table, first_key + j, lane);
      if (l2) s += broadcast(key_bias_[j]);
      top = maximum<T>(top, s);
      if (table != nullptr || l2) store(scores + j * lanes, s);
    }
    Vector<T> total{};
    for (int64_t j = 0; j < keys; ++j) {
      const Vector<T> e = exp2(load(scores + j * lanes) - top);
      total += e;
      store(scores + j * lanes, e);
    }
    const Vector<T> correction = exp2(before - top);
    store(correction_ + lane, correction);
    store(maximum_ + lane, top);
    store(sum_ + lane, load(sum_ + lane) * correction + total);
  }

  const Arguments& a_;
  const DensePlan<T>& plan_;
  const DenseTables<T>& tables_;
  WindowsInstead<T, NeighborhoodForward<T>> windows_;
  Origin<T> key_origin_;
  KeyOperand<T> key_, value_;
  TableIndex<T> index_;
  Buffer<T> query_, query_t_, scores_;
  QuerySums<T> output_;
  Buffer<T> maximum_, sum_, log_sum_, correction_, key_bias_;
};

template <class T>
void dense_forward(const Arguments& a, HeadRange heads) {
  const Problem& p = a.problem;
  const DensePlan<T> plan(p, heads, p.head_dim > 128 ? 32 : 64, 128);
  const auto tables = DenseTables<T>::scores(a.bias, plan);
  run_dense_queries<T>(plan, kForwardCost, [&] { return DenseForward<T>(a, plan, tables); });
}

}  // namespace natten_ext::NATTEN_EXT_ISA
