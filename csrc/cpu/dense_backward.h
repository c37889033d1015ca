// Backward of the dense kernels. With P = exp(S - lse) and D = rowsum(P * dP):
//   dP = dO V^T   dS = P (dP - D + y)   dQ = a dS K   dK = a dS^T Q (l2: - a K colsum(dS))   dV = P^T dO
// with y the gradient of the log-sum-exp,
// and the table's gradient is the sum of dS over equal offsets. Q, K and V are counted from the places in origin.h.
//
// Where a whole row of keys is at hand, D is summed there. Otherwise it is rowsum(dO * O), with the rounding of O.
#pragma once

#include "dense_query_sums.h"
#include "dense_saved.h"
#include "dense_tasks.h"
#include "dense_windows.h"
#include "neighborhood_backward.h"

namespace natten_ext::NATTEN_EXT_ISA {

// What one block of queries needs for P and dS; shared with the double backward.
template <class T>
class BackwardQueries : public SavedQueries<T> {
 public:
  using SavedQueries<T>::query;

  // `need_output`: whether D is taken from the output, else it is zero.
  BackwardQueries(const Arguments& a, const DensePlan<T>& plan, bool need_output)
      : SavedQueries<T>(a, plan),
        a_(a),
        plan_(plan),
        need_output_(need_output),
        grad_output(plan.block_queries * plan.padded),
        grad_output_t(plan.padded * plan.block_queries),
        d(plan.block_queries),
        grad_lse(plan.block_queries),
        output_t_(need_output ? plan.padded * plan.block_queries : 0) {
    for (Buffer<T>* zero : {&d, &grad_lse}) std::fill_n(zero->data(), plan.block_queries, T(0));
  }

  // The origins are those of the job's keys and values.
  void load(const DenseJob& job, int64_t first, int64_t count, const T* key_origin, const T* value_origin) {
    lanes = round_up_to_lanes<T>(count);
    pack_queries<T>(grad_output, grad_output_t, a_.grad_output, plan_, job, first, count, 1);
    // As long as they are not in use, the queries' rows hold those of the output.
    if (need_output_) {
      pack_queries<T>(query, output_t_, a_.output, plan_, job, first, count, 1, value_origin);
      dot_lanes<T>(d, grad_output_t, output_t_, plan_.channels, lanes);
    }
    SavedQueries<T>::load(job, first, count, key_origin);
    if (!a_.grad_lse) return;
    RowCursor row(a_.grad_lse, job, plan_.window_x, first);
    for (int64_t i = 0; i < count; ++i, ++row) grad_lse[i] = static_cast<const T*>(a_.grad_lse.data)[row.offset];
    std::fill(grad_lse + count, grad_lse + lanes, T(0));
  }
  // The l2 term of a gradient of the queries of the tensor that `packed` holds: row[i] -= sums[i] q_i, in units of `row`.
  // Without grad_lse the sums vanish but for rounding, which they keep from being multiplied by whole keys rather than
  // distances.
  void subtract_own(T* row, const T* packed, const T* sums, int64_t count) const {
    const T factor = T(a_.problem.dot_scale()) * kLog2E<T>;
    for (int64_t i = 0; i < count && std::isnormal(factor); ++i) {
      subtract_row<T>(row + i * plan_.padded, packed + i * plan_.padded, sums[i] / factor, plan_.channels);
    }
  }
  // The same for dot, where keys are counted from their origin: row[i] += y m.
  void add_origin(T* row, const T* key_origin, int64_t count) const {
    for (int64_t i = 0; a_.grad_lse && i < count; ++i) subtract_row<T>(row + i * plan_.padded, key_origin, -grad_lse[i], plan_.channels);
  }

 private:
  const Arguments& a_;
  const DensePlan<T>& plan_;
  const bool need_output_;

 public:
  int64_t lanes = 0;  // whole vectors of queries, by which rows of scores are apart
  Buffer<T> grad_output, grad_output_t;
  Buffer<T> d;     // D so far
  Buffer<T> grad_lse;  // y

 private:
  Buffer<T> output_t_;
};

template <class T>
class DenseBackward {
 public:
  DenseBackward(const Arguments& a, const DensePlan<T>& plan, const DenseTables<T>& tables, int64_t keys_at_once)
      : a_(a),
        plan_(plan),
        tables_(tables),
        windows_(a, plan),
        key_origin_(a.key, a.problem, plan.key_heads()),
        value_origin_(a.value, a.problem, plan.key_heads()),
        queries_(a, plan, plan.keys > plan.block_keys),
        key_(a.key, plan, &key_origin_),
        value_(a.value, plan, &value_origin_),
        grad_key_(a.grad_key, plan, keys_at_once),
        grad_value_(a.grad_value, plan, keys_at_once),
        table_gradient_(plan, static_cast<bool>(a.grad_bias)),
        index_(plan, tables.head(plan.heads.first) != nullptr),
        probability_(plan.block_keys * plan.block_queries),
        grad_score_(plan.block_keys * plan.block_queries),
        grad_query_(plan, static_cast<bool>(a.grad_query)),
        row_sum_(plan.block_queries),
        key_bias_(plan.block_keys) {}

  // Partial gradients of the tables of the jobs that follow, which are added to.
  void start(const PartialTables<T>& partial) {
    table_gradient_.start(partial);
    windows_.start(partial);
  }
  void finish() {
    table_gradient_.finish();
    windows_.finish();
  }

  void prefetch(const DenseJob& job) const {
    for (const View* v : {&a_.query, &a_.key, &a_.value, &a_.grad_output}) prefetch_rows(*v, plan_, job);
  }

  void run(const DenseJob& job, const DenseShare<T>& share) {
    if (windows_.run(job, plan_.shared)) return;
    key_.start(job);
    value_.start(job);
    grad_key_.start(job, share.key_begin);
    grad_value_.start(job, share.key_begin);
    for (int64_t member = 0; member < plan_.shared; ++member) run_head(job.of_head(job.head + member), share, member);
    if (!share.want_key_side || share.query_end < plan_.queries) return;
    // The packed queries carry log2(e).
    if (grad_key_) grad_key_.finish(share.key_end, kLn2<T>);
    if (grad_value_) grad_value_.finish(share.key_end, 1);
  }

 private:
  void run_head(const DenseJob& job, const DenseShare<T>& share, int64_t member) {
    for (int64_t first = share.query_begin; first < share.query_end; first += plan_.block_queries) {
      const int64_t count = std::min(plan_.block_queries, share.query_end - first);
      queries_.load(job, first, count, key_.origin(), value_.origin());
      if (tables_.head(job.head) != nullptr) index_.start(first, count);
      for (int64_t k = share.key_begin; k < share.key_end; k += plan_.block_keys) {
        block(job, share, member, first, count, k, std::min(plan_.block_keys, share.key_end - k));
      }
      if (share.want_query_side && a_.grad_query) {
        T* rows = grad_query_.rows(count);
        if (a_.problem.l2) queries_.subtract_own(rows, queries_.query, row_sum_, count);
        else queries_.add_origin(rows, key_.origin(), count);
        unpack_rows<T>(rows, a_.grad_query, plan_, job, plan_.window_x, first, count, a_.problem.dot_scale());
      }
    }
  }

  void block(const DenseJob& job, const DenseShare<T>& share, int64_t member, int64_t first, int64_t count,
             int64_t first_key, int64_t keys) {
    const bool first_queries = first == 0 && member == 0, first_keys = first_key == share.key_begin;
    const int64_t lanes = queries_.lanes, padded = plan_.padded, channels = plan_.channels;
    const Problem& p = a_.problem;
    const T* key = key_.block(first_key, keys);
    gemm<T>(keys, lanes, channels, {key, padded, 1}, queries_.query_t, lanes, probability_, lanes, false);
    gemm<T>(keys, lanes, channels, {value_.block(first_key, keys), padded, 1}, queries_.grad_output_t, lanes,
            grad_score_, lanes, false);
    if (p.l2) l2_key_bias<T>(key_bias_, key, keys, plan_, p.scale);
    if (first_keys) std::fill_n(row_sum_.data(), lanes, T(0));
    const T* table = tables_.head(job.head);
    T* grad_table = share.want_query_side ? table_gradient_.data(member) : nullptr;
    for (int64_t lane = 0; lane < lanes; lane += kLanes<T>) scores(table, first_key, keys, lane, grad_table);
    if (share.want_query_side && a_.grad_query) grad_query_.add(grad_score_, count, keys, key, !first_keys);
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
    const int64_t lanes = queries_.lanes;
    const bool l2 = a_.problem.l2;
    const LaneWeights<T> weights(queries_, table, index_, l2 ? key_bias_.data() : nullptr, lane);
    const bool whole_row = keys == plan_.keys;
    Vector<T> d = load(queries_.d + lane) - load(queries_.grad_lse + lane), row_sum = load(row_sum_ + lane);
    const auto finish = [&](int64_t j, Vector<T> probability) __attribute__((always_inline)) {
      T* dp = grad_score_ + j * lanes + lane;
      const Vector<T> grad = probability * (load(dp) - d);
      if (l2) row_sum += grad;
      store(dp, grad);
      if (grad_table != nullptr) index_.add(grad_table, first_key + j, lane, grad);
    };
    for (int64_t j = 0; j < keys; ++j) {
      T* s = probability_ + j * lanes + lane;
      const Vector<T> probability = weights(load(s), first_key, j);
      store(s, probability);
      if (whole_row) d += probability * load(grad_score_ + j * lanes + lane);
      else finish(j, probability);
    }
    for (int64_t j = 0; whole_row && j < keys; ++j) finish(j, load(probability_ + j * lanes + lane));
    store(row_sum_ + lane, row_sum);
  }

  const Arguments& a_;
  const DensePlan<T>& plan_;
  const DenseTables<T>& tables_;
  WindowsInstead<T, NeighborhoodBackward<T>> windows_;
  Origin<T> key_origin_, value_origin_;
  BackwardQueries<T> queries_;
  KeyOperand<T> key_, value_;
  KeyGradient<T> grad_key_, grad_value_;
  DenseTableGradient<T> table_gradient_;
  TableIndex<T> index_;
  Buffer<T> probability_, grad_score_;
  QuerySums<T> grad_query_;
  Buffer<T> row_sum_, key_bias_;
};

template <class T>
void dense_backward(const Arguments& a, HeadRange heads) {
  const Problem& p = a.problem;
  const DensePlan<T> plan(p, heads, p.head_dim > 128 ? 32 : 64, 128);
  const auto tables = DenseTables<T>::scores(a.bias, plan);
  run_dense_gradients<T>(
      a, plan, kBackwardCost, [&](int64_t keys_at_once) { return DenseBackward<T>(a, plan, tables, keys_at_once); });
}

}  // namespace natten_ext::NATTEN_EXT_ISA
