// Backward of the dense kernels. With P = exp(S - lse) and D = rowsum(P * dP):
//   dP = dO V^T   dS = P (dP - D + y)   dQ = a dS K   dK = a dS^T Q (l2: - a K colsum(dS))   dV = P^T dO
// with y the gradient of the log-sum-exp,
// and the table's gradient is the sum of dS over equal offsets. Q, K and V are counted from the places in origin.h.
//
// D must be known before the first dS: taken as rowsum(dO * O) it would have the rounding of O, which costs digits where
// values have a mean. So P and dP of a block of queries are held for all keys: a first walk over blocks of keys computes them
// and D, a second dS and all products, from the last block on, which is still in the cache and has its dS already.
#pragma once

#include "dense_query_sums.h"
#include "dense_saved.h"
#include "dense_tasks.h"
#include "dense_windows.h"
#include "neighborhood_backward.h"

namespace natten_ext::NATTEN_EXT_ISA {

// What one block of queries needs for P and dP; shared with the double backward.
template <class T>
class BackwardQueries : public SavedQueries<T> {
 public:
  using SavedQueries<T>::query;

  BackwardQueries(const Arguments& a, const DensePlan<T>& plan)
      : SavedQueries<T>(a, plan),
        a_(a),
        plan_(plan),
        grad_output(plan.block_queries * plan.padded),
        grad_output_t(plan.padded * plan.block_queries),
        grad_lse(plan.block_queries) {
    std::fill_n(grad_lse.data(), plan.block_queries, T(0));
  }

  // The origin is that of the job's keys.
  void load(const DenseJob& job, int64_t first, int64_t count, const T* key_origin) {
    lanes = round_up_to_lanes<T>(count);
    pack_queries<T>(grad_output, grad_output_t, a_.grad_output, plan_, job, first, count, 1);
    SavedQueries<T>::load(job, first, count, key_origin);
    if (!a_.grad_lse) return;
    RowCursor row(a_.grad_lse, job, plan_.window_x, first);
    for (int64_t i = 0; i < count; ++i, ++row) grad_lse[i] = static_cast<const T*>(a_.grad_lse.data)[row.offset];
    std::fill(grad_lse + count, grad_lse + lanes, T(0));
  }
  // Passes row sums from the call for the query side of a job to those for its key side.
  void pass_sums(const DenseShare<T>& share, int64_t member, int64_t first, int64_t count,
                 std::initializer_list<Buffer<T>*> all) const {
    T* kept = share.sums + member * static_cast<int64_t>(all.size()) * plan_.queries + first;
    for (Buffer<T>* sums : all) {
      if (share.want_query_side) std::copy_n(sums->data(), count, kept);
      else std::copy_n(kept, count, sums->data());
      std::fill(*sums + count, *sums + lanes, T(0));
      kept += plan_.queries;
    }
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

 public:
  int64_t lanes = 0;  // whole vectors of queries, by which rows of scores are apart
  Buffer<T> grad_output, grad_output_t;
  Buffer<T> grad_lse;  // y
};

template <class T>
class DenseBackward {
 public:
  static constexpr int64_t kBlockKeys = 128;
  // Keys and values are packed once up to this size: both passes want the keys.
  static constexpr int64_t kWholeAtMost = 1 << 18;

  // At most so many queries at once. Against many keys three vectors of 16 lanes, whole tiles of gemm, as long as what is held
  // of them has at most kHeldAtMost bytes. With fewer than 32, gradients of keys take longer to add up.
  static constexpr double kHeldAtMost = 8 << 20;
  static int64_t queries_at_once(const Problem& p, int64_t keys) {
    if (keys <= kBlockKeys) return p.head_dim > 128 ? 32 : 64;
    const int64_t at_most = static_cast<int64_t>(kHeldAtMost / (2 * sizeof(T) * double(keys)));
    return std::clamp<int64_t>(at_most, 32, p.head_dim > 128 ? 32 : 48);
  }

  DenseBackward(const Arguments& a, const DensePlan<T>& plan, const DenseTables<T>& tables, int64_t keys_at_once)
      : a_(a),
        plan_(plan),
        tables_(tables),
        windows_(a, plan),
        key_origin_(a.key, a.problem, plan.key_heads()),
        value_origin_(a.value, a.problem, plan.key_heads()),
        queries_(a, plan),
        key_(a.key, plan, &key_origin_, kWholeAtMost),
        value_(a.value, plan, &value_origin_, kWholeAtMost),
        grad_key_(a.grad_key, plan, keys_at_once),
        grad_value_(a.grad_value, plan, keys_at_once),
        table_gradient_(plan, static_cast<bool>(a.grad_bias)),
        index_(plan, tables.head(plan.heads.first) != nullptr),
        probability_(plan.keys * plan.block_queries),
        grad_score_(plan.keys * plan.block_queries),
        grad_query_(plan, static_cast<bool>(a.grad_query)),
        d_(plan.block_queries),
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
    const T* table = tables_.head(job.head);
    for (int64_t first = share.query_begin; first < share.query_end; first += plan_.block_queries) {
      const int64_t count = std::min(plan_.block_queries, share.query_end - first);
      queries_.load(job, first, count, key_.origin());
      if (table != nullptr) index_.start(first, count);
      for (int64_t lane = 0; lane < queries_.lanes; lane += kLanes<T>) store(d_ + lane, -load(queries_.grad_lse + lane));
      std::fill_n(row_sum_.data(), queries_.lanes, T(0));
      for (int64_t k = 0; share.want_query_side && k < plan_.keys; k += plan_.block_keys) {
        scores(table, share, member, k, std::min(plan_.block_keys, plan_.keys - k));
      }
      if (share.sums != nullptr) queries_.pass_sums(share, member, first, count, {&d_});
      for (int64_t end = share.key_end; end > share.key_begin;) {
        const int64_t k = (end - 1) / plan_.block_keys * plan_.block_keys, keys = end - k;
        if (!share.want_query_side) scores(table, share, member, k, keys);
        else if (end < plan_.keys) grad_scores(share, member, k, keys);
        products(share, first == 0 && member == 0, count, k, keys);
        end = k;
      }
      if (share.want_query_side && a_.grad_query) {
        T* rows = grad_query_.rows(count);
        if (a_.problem.l2) queries_.subtract_own(rows, queries_.query, row_sum_, count);
        else queries_.add_origin(rows, key_.origin(), count);
        unpack_rows<T>(rows, a_.grad_query, plan_, job, plan_.window_x, first, count, a_.problem.dot_scale());
      }
    }
  }

  // Where a block of keys begins in what is held of P and dP.
  int64_t held(const DenseShare<T>& share, int64_t first_key) const {
    return share.want_query_side ? first_key * queries_.lanes : 0;
  }
  T* grad_table(const DenseShare<T>& share, int64_t member) const {
    return share.want_query_side ? table_gradient_.data(member) : nullptr;
  }

  // P and dP of one block of keys, which for the query side are added to D. Where D is known then, dS.
  void scores(const T* table, const DenseShare<T>& share, int64_t member, int64_t first_key, int64_t keys) {
    const int64_t lanes = queries_.lanes, padded = plan_.padded, channels = plan_.channels;
    const bool l2 = a_.problem.l2, sum_rows = share.want_query_side, known = !sum_rows || first_key + keys == plan_.keys;
    T* probability = probability_ + held(share, first_key);
    T* grad_probability = grad_score_ + held(share, first_key);
    T* to_table = grad_table(share, member);
    const T* key = key_.block(first_key, keys);
    gemm<T>(keys, lanes, channels, {key, padded, 1}, queries_.query_t, lanes, probability, lanes, false);
    gemm<T>(keys, lanes, channels, {value_.block(first_key, keys), padded, 1}, queries_.grad_output_t, lanes,
            grad_probability, lanes, false);
    if (l2) l2_key_bias<T>(key_bias_, key, keys, plan_, a_.problem.scale);
    for (int64_t lane = 0; lane < lanes; lane += kLanes<T>) {
      const LaneWeights<T> weights(queries_, table, index_, l2 ? key_bias_.data() : nullptr, lane);
      Vector<T> d{};  // of this block, which rounds less than to go on adding up the row
      for (int64_t at = lane, j = 0; j < keys; ++j, at += lanes) {
        const Vector<T> weight = weights(load(probability + at), first_key, j);
        store(probability + at, weight);
        d += weight * load(grad_probability + at);
      }
      if (sum_rows) store(d_ + lane, load(d_ + lane) + d);
      if (known) grad_scores(probability, grad_probability, to_table, first_key, keys, lane);
    }
  }

  // dS of one block of keys.
  void grad_scores(const DenseShare<T>& share, int64_t member, int64_t first_key, int64_t keys) {
    const T* probability = probability_ + held(share, first_key);
    T* grad_score = grad_score_ + held(share, first_key);
    T* to_table = grad_table(share, member);
    for (int64_t lane = 0; lane < queries_.lanes; lane += kLanes<T>) {
      grad_scores(probability, grad_score, to_table, first_key, keys, lane);
    }
  }
  NATTEN_EXT_INLINE void grad_scores(const T* probability, T* grad_score, T* to_table, int64_t first_key, int64_t keys,
                                     int64_t lane) {
    const int64_t lanes = queries_.lanes;
    const bool l2 = a_.problem.l2;
    const Vector<T> d = load(d_ + lane);
    Vector<T> row_sum = load(row_sum_ + lane);
    for (int64_t at = lane, j = 0; j < keys; ++j, at += lanes) {
      const Vector<T> grad = load(probability + at) * (load(grad_score + at) - d);
      if (l2) row_sum += grad;
      store(grad_score + at, grad);
      if (to_table != nullptr) index_.add(to_table, first_key + j, lane, grad);
    }
    store(row_sum_ + lane, row_sum);
  }

  // The shares of one block of keys in all gradients but the table's.
  void products(const DenseShare<T>& share, bool first_queries, int64_t count, int64_t first_key, int64_t keys) {
    const int64_t lanes = queries_.lanes, padded = plan_.padded;
    const T* probability = probability_ + held(share, first_key);
    const T* grad_score = grad_score_ + held(share, first_key);
    const T* key = key_.block(first_key, keys);
    if (share.want_query_side && a_.grad_query) grad_query_.add(grad_score, count, keys, key, first_key + keys < plan_.keys);
    if (!share.want_key_side) return;
    if (grad_value_) {
      gemm<T>(keys, padded, count, {probability, lanes, 1}, queries_.grad_output, padded, grad_value_.row(first_key),
              grad_value_.stride(), !first_queries);
    }
    if (!grad_key_) return;
    T* grad_key = grad_key_.row(first_key);
    const int64_t stride = grad_key_.stride();
    gemm<T>(keys, padded, count, {grad_score, lanes, 1}, queries_.query, padded, grad_key, stride, !first_queries);
    for (int64_t j = 0; a_.problem.l2 && j < keys; ++j) {
      const T sum = sum_row(grad_score + j * lanes, count);
      subtract_row<T>(grad_key + j * stride, key + j * padded, sum * T(a_.problem.dot_scale()) * kLog2E<T>, plan_.channels);
    }
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
  Buffer<T> probability_, grad_score_;  // of all keys: P, and dP that becomes dS
  QuerySums<T> grad_query_;
  Buffer<T> d_, row_sum_, key_bias_;  // D - y, the sums of dS
};

template <class T>
void dense_backward(const Arguments& a, HeadRange heads) {
  using Kernel = DenseBackward<T>;
  const int64_t keys = DensePlan<T>(a.problem, heads, 1, 1).keys;
  const DensePlan<T> plan(a.problem, heads, Kernel::queries_at_once(a.problem, keys), Kernel::kBlockKeys);
  const auto tables = DenseTables<T>::scores(a.bias, plan);
  run_dense_gradients<T>(
      a, plan, kBackwardCost, [&](int64_t keys_at_once) { return Kernel(a, plan, tables, keys_at_once); });
}

}  // namespace natten_ext::NATTEN_EXT_ISA
