// Backward of the dense kernels. With P = exp(S - lse) and D = rowsum(dO * O):
//   dP = dO V^T   dS = P (dP - D)   dQ = a dS K   dK = a dS^T Q (l2: - a K colsum(dS))   dV = P^T dO
// and the table's gradient is the sum of dS over equal offsets.
#pragma once

#include <limits>

#include "dense.h"

namespace natten_ext::NATTEN_EXT_ISA {

// What one block of queries needs for P and dS; shared with the double backward.
template <class T>
class BackwardQueries {
 public:
  // Base of lanes without a query: makes their P vanish.
  static constexpr T kNoQuery = std::numeric_limits<T>::infinity();

  BackwardQueries(const Arguments& a, const DensePlan<T>& plan)
      : a_(a),
        plan_(plan),
        query(plan.block_queries * plan.padded),
        query_t(plan.padded * plan.block_queries),
        grad_output(plan.block_queries * plan.padded),
        grad_output_t(plan.padded * plan.block_queries),
        output(plan.block_queries * plan.padded),
        base(plan.block_queries),
        log_sum(plan.block_queries),
        delta(plan.block_queries) {}

  void load(const DenseJob& job, int64_t first, int64_t count) {
    const Problem& p = a_.problem;
    pack_queries<T>(query, query_t, a_.query, plan_, job, first, count, T(p.dot_scale()) * kLog2E<T>);
    pack_queries<T>(grad_output, grad_output_t, a_.grad_output, plan_, job, first, count, 1);
    pack_rows<T>(output, a_.output, plan_, job, plan_.window_x, first, count, 1);
    RowCursor lse = lse_cursor(p, job, plan_.window_x, first);
    for (int64_t i = 0; i < count; ++i, ++lse) {
      const T* parts = static_cast<const T*>(a_.lse) + lse.offset;
      base[i] = parts[0];
      log_sum[i] = parts[p.rows()];
      delta[i] = dot_row(grad_output + i * plan_.padded, output + i * plan_.padded, plan_.padded);
    }
    std::fill(base + count, base + plan_.block_queries, kNoQuery);
    std::fill(log_sum + count, log_sum + plan_.block_queries, T(0));
    std::fill(delta + count, delta + plan_.block_queries, T(0));
  }

 private:
  const Arguments& a_;
  const DensePlan<T>& plan_;

 public:
  Buffer<T> query, query_t;  // times a log2(e)
  Buffer<T> grad_output, grad_output_t, output;
  Buffer<T> base, log_sum, delta;  // the two parts of lse; D
};

// row[c] -= factor * other[c]
template <class T>
NATTEN_EXT_INLINE void subtract_row(T* row, const T* other, T factor, int64_t n) {
  for (int64_t c = 0; c < n; ++c) row[c] -= factor * other[c];
}

template <class T>
class DenseBackward {
 public:
  DenseBackward(const Arguments& a, const DensePlan<T>& plan, const DenseTables<T>& tables, int64_t keys_at_once)
      : a_(a),
        plan_(plan),
        tables_(tables),
        queries_(a, plan),
        key_(a.key, plan),
        value_(a.value, plan),
        grad_key_(a.grad_key, plan, keys_at_once),
        grad_value_(a.grad_value, plan, keys_at_once),
        table_gradient(plan, static_cast<bool>(a.grad_bias)),
        index_(plan, tables.head(plan.heads.first) != nullptr),
        probability_(plan.block_keys * plan.block_queries),
        grad_score_(plan.block_keys * plan.block_queries),
        grad_query_(plan.block_queries * plan.padded),
        key_bias_(plan.block_keys) {}

  void prefetch(const DenseJob& job) const {
    for (const View* v : {&a_.query, &a_.key, &a_.value, &a_.output, &a_.grad_output}) prefetch_rows(*v, plan_, job);
  }

  void run(const DenseJob& job, const DenseShare& share) {
    key_.start(job);
    value_.start(job);
    grad_key_.start(job, share.key_begin);
    grad_value_.start(job, share.key_begin);
    for (int64_t first = share.query_begin; first < share.query_end; first += plan_.block_queries) {
      const int64_t count = std::min(plan_.block_queries, share.query_end - first);
      queries_.load(job, first, count);
      if (tables_.head(job.head) != nullptr) index_.start(first, count);
      for (int64_t k = share.key_begin; k < share.key_end; k += plan_.block_keys) {
        block(job, share, first, count, k, std::min(plan_.block_keys, share.key_end - k));
      }
      if (share.want_query_side && a_.grad_query) {
        unpack_rows<T>(grad_query_, a_.grad_query, plan_, job, plan_.window_x, first, count, a_.problem.dot_scale());
      }
    }
    if (!share.want_key_side) return;
    // The packed queries carry log2(e).
    if (grad_key_) grad_key_.finish(share.key_end, kLn2<T>);
    if (grad_value_) grad_value_.finish(share.key_end, 1);
  }

 private:
  void block(const DenseJob& job, const DenseShare& share, int64_t first, int64_t count, int64_t first_key, int64_t keys) {
    const bool first_queries = first == share.query_begin, first_keys = first_key == share.key_begin;
    const int64_t lanes = plan_.block_queries, padded = plan_.padded, channels = plan_.channels;
    const Problem& p = a_.problem;
    const T* key = key_.block(first_key, keys);
    gemm<T>(keys, lanes, channels, {key, padded, 1}, queries_.query_t, lanes, probability_, lanes, false);
    gemm<T>(keys, lanes, channels, {value_.block(first_key, keys), padded, 1}, queries_.grad_output_t, lanes,
            grad_score_, lanes, false);
    if (p.l2) l2_key_bias<T>(key_bias_, key, keys, plan_, p.scale);
    const T* table = tables_.head(job.head);
    for (int64_t lane = 0; lane < lanes; lane += kLanes<T>) scores(table, first_key, keys, lane, share.want_query_side ? table_gradient.data() : nullptr);
    if (share.want_query_side && a_.grad_query) {
      gemm<T>(count, padded, keys, {grad_score_, 1, lanes}, key, padded, grad_query_, padded, !first_keys);
    }
    if (!share.want_key_side) return;
    if (grad_value_) {
      gemm<T>(keys, padded, count, {probability_, lanes, 1}, queries_.grad_output, padded, grad_value_.row(first_key),
              grad_value_.stride(), !first_queries);
    }
    if (grad_key_) {
      gemm<T>(keys, padded, count, {grad_score_, lanes, 1}, queries_.query, padded, grad_key_.row(first_key),
              grad_key_.stride(), !first_queries);
      if (!p.l2) return;
      for (int64_t j = 0; j < keys; ++j) {
        const T sum = sum_row(grad_score_ + j * lanes, count);
        subtract_row<T>(grad_key_.row(first_key) + j * grad_key_.stride(), key + j * padded,
                        sum * T(p.dot_scale()) * kLog2E<T>, channels);
      }
    }
  }

  // One vector of queries: scores to P, and dP to dS.
  NATTEN_EXT_INLINE void scores(const T* table, int64_t first_key, int64_t keys, int64_t lane, T* grad_table) {
    const int64_t lanes = plan_.block_queries;
    const bool l2 = a_.problem.l2;
    const Vector<T> base = load(queries_.base + lane), log_sum = load(queries_.log_sum + lane);
    const Vector<T> delta = load(queries_.delta + lane);
    for (int64_t j = 0; j < keys; ++j) {
      T* s = probability_ + j * lanes + lane;
      T* dp = grad_score_ + j * lanes + lane;
      Vector<T> score = load(s);
      if (table != nullptr) score += index_.read(table, first_key + j, lane);
      if (l2) score += broadcast(key_bias_[j]);
      const Vector<T> probability = exp2(score - base - log_sum);
      const Vector<T> grad = probability * (load(dp) - delta);
      store(s, probability);
      store(dp, grad);
      if (grad_table != nullptr) index_.add(grad_table, first_key + j, lane, grad);
    }
  }

  const Arguments& a_;
  const DensePlan<T>& plan_;
  const DenseTables<T>& tables_;
  BackwardQueries<T> queries_;
  KeyOperand<T> key_, value_;
  KeyGradient<T> grad_key_, grad_value_;

 public:
  DenseTableGradient<T> table_gradient;

 private:
  TableIndex<T> index_;
  Buffer<T> probability_, grad_score_, grad_query_, key_bias_;
};

template <class T>
void dense_backward(const Arguments& a, HeadRange heads) {
  const Problem& p = a.problem;
  const DensePlan<T> plan(p, heads, p.head_dim > 128 ? 32 : 64, 128);
  const DenseTables<T> tables(a.bias, plan, kLog2E<T>, DenseTables<T>::kMasked);
  run_dense_gradients<T>(
      a, plan, [&](int64_t keys_at_once) { return DenseBackward<T>(a, plan, tables, keys_at_once); });
}

}  // namespace natten_ext::NATTEN_EXT_ISA
