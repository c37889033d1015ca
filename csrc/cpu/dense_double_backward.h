// Double backward of the dense kernels (docs/double_backward.md). With gQ, gK, gV, gbias the cotangents of the
// first gradients and a the factor of q.k:
//   X = a (gQ K^T + Q gK^T) + gbias   (l2: - a gK.K per key)      G = dO gV^T
//   first pass, per row:   D = sum P dP   r = sum P X   w = P gV   t = sum P (X - r) (dP - D) + dO.w
//   second pass, with dP - D + y in the place of dP - D:   Sb = P ((X - r) (dP - D) + G - t)   dS = P (dP - D)
//     q_bar = a (Sb K + dS gK)     k_bar = a (Sb^T Q + dS^T gQ)   (l2: - a (K colsum(Sb) + gK colsum(dS)))
//     v_bar = (P (X - r))^T dO     dO_bar = P (X - r) V + w       table: sum of Sb over equal offsets
// Q, K and V are counted from the places in origin.h, dP from dO.O, which is D but for the rounding of O.
#pragma once

#include "dense_backward.h"
#include "neighborhood_double_backward.h"

namespace natten_ext::NATTEN_EXT_ISA {

template <class T>
class DenseDoubleBackward {
 public:
  // Blocks of scores of a whole row of keys are kept between the passes up to this size, else computed again.
  static constexpr int64_t kKeepAtMost = 1 << 14;

  DenseDoubleBackward(const Arguments& a, const DensePlan<T>& plan, const DenseTables<T>& tables,
                      const DenseTables<T>& cot_tables, int64_t keys_at_once)
      : a_(a),
        plan_(plan),
        tables_(tables),
        keep_(plan.keys * plan.block_queries <= kKeepAtMost),
        windows_(a, plan),
        key_origin_(a.key, a.problem, plan.key_heads()),
        value_origin_(a.value, a.problem, plan.key_heads()),
        queries_(a, plan),
        key_(a.key, plan, &key_origin_),
        value_(a.value, plan, &value_origin_),
        cot_value_(a.cot_value, plan),
        score_tangent_(a, plan, cot_tables),
        grad_key_(a.grad_key, plan, keys_at_once),
        grad_value_(a.grad_value, plan, keys_at_once),
        table_gradient_(plan, static_cast<bool>(a.grad_bias)),
        index_(plan, tables.head(plan.heads.first) != nullptr),
        probability_(kept_keys() * plan.block_queries),
        grad_probability_(kept_keys() * plan.block_queries),
        x_(kept_keys() * plan.block_queries),
        scratch_(plan.block_keys * plan.block_queries),
        output_t_(plan.padded * plan.block_queries),
        transposed_(a.cot_value ? plan.padded * plan.block_queries : 0),
        grad_grad_output_(plan, a.grad_grad_output || a.cot_value),
        grad_query_(plan, static_cast<bool>(a.grad_query)),
        d_(plan.block_queries),
        d_rest_(plan.block_queries),
        r_(plan.block_queries),
        r_rest_(plan.block_queries),
        t_(plan.block_queries),
        score_bar_sum_(plan.block_queries),
        grad_score_sum_(plan.block_queries),
        key_bias_(plan.block_keys) {}

  // As DenseBackward.
  void start(const PartialTables<T>& partial) {
    table_gradient_.start(partial);
    windows_.start(partial);
  }
  void finish() {
    table_gradient_.finish();
    windows_.finish();
  }

  void prefetch(const DenseJob& job) const {
    for (const View* v : {&a_.query, &a_.key, &a_.value, &a_.output, &a_.grad_output, &a_.cot_query, &a_.cot_key,
                          &a_.cot_value}) {
      prefetch_rows(*v, plan_, job);
    }
  }

  void run(const DenseJob& job, const DenseShare<T>& share) {
    if (windows_.run(job, plan_.shared)) return;
    for (KeyOperand<T>* operand : {&key_, &value_, &cot_value_}) operand->start(job);
    grad_key_.start(job, share.key_begin);
    grad_value_.start(job, share.key_begin);
    for (int64_t member = 0; member < plan_.shared; ++member) run_head(job.of_head(job.head + member), share, member);
    if (!share.want_key_side || share.query_end < plan_.queries) return;
    if (grad_key_) grad_key_.finish(share.key_end, kLn2<T>);
    if (grad_value_) grad_value_.finish(share.key_end, 1);
  }

 private:
  void run_head(const DenseJob& job, const DenseShare<T>& share, int64_t member) {
    score_tangent_.start(job);
    for (int64_t first = share.query_begin; first < share.query_end; first += plan_.block_queries) {
      const int64_t count = std::min(plan_.block_queries, share.query_end - first);
      load_queries(job, first, count);
      if (share.want_query_side) first_pass(job, count);
      if (share.sums != nullptr) queries_.pass_sums(share, member, first, count, {&d_rest_, &r_, &r_rest_, &t_});
      for (Buffer<T>* sums : {&score_bar_sum_, &grad_score_sum_}) std::fill_n(sums->data(), queries_.lanes, T(0));
      for (int64_t k = share.key_begin; k < share.key_end; k += plan_.block_keys) {
        second_pass(job, share, member, first, count, k, std::min(plan_.block_keys, share.key_end - k));
      }
      if (share.want_query_side && a_.grad_grad_output) {
        unpack_rows<T>(grad_grad_output_.rows(count), a_.grad_grad_output, plan_, job, plan_.window_x, first, count, 1);
      }
      if (share.want_query_side && a_.grad_grad_lse) store_means(job, first, count);
      if (share.want_query_side && a_.grad_query) {
        T* rows = grad_query_.rows(count);
        if (a_.problem.l2) {
          queries_.subtract_own(rows, queries_.query, score_bar_sum_, count);
          if (a_.cot_query) queries_.subtract_own(rows, score_tangent_.cot_query, grad_score_sum_, count);
        }
        unpack_rows<T>(rows, a_.grad_query, plan_, job, plan_.window_x, first, count, a_.problem.dot_scale());
      }
    }
  }

  int64_t kept_keys() const { return keep_ ? plan_.keys : plan_.block_keys; }
  int64_t kept(int64_t first_key) const { return keep_ ? first_key * queries_.lanes : 0; }

  void load_queries(const DenseJob& job, int64_t first, int64_t count) {
    // As long as they are not in use, the queries' rows hold those of the output.
    pack_queries<T>(queries_.query, output_t_, a_.output, plan_, job, first, count, 1, value_.origin());
    queries_.load(job, first, count, key_.origin());
    dot_lanes<T>(d_, queries_.grad_output_t, output_t_, plan_.channels, queries_.lanes);
    score_tangent_.load_queries(job, first, count);
    if (tables_.head(job.head) != nullptr) index_.start(first, count);
  }

  // P, dP (less D as it comes from the output) and X of one block of keys; adds to the row sums if asked to.
  void scores(const DenseJob& job, int64_t first_key, int64_t keys, bool sum_rows) {
    const int64_t lanes = queries_.lanes, padded = plan_.padded, channels = plan_.channels;
    const Problem& p = a_.problem;
    T* probability = probability_ + kept(first_key);
    T* grad_probability = grad_probability_ + kept(first_key);
    T* x = x_ + kept(first_key);
    const T* key = key_.block(first_key, keys);
    gemm<T>(keys, lanes, channels, {key, padded, 1}, queries_.query_t, lanes, probability, lanes, false);
    gemm<T>(keys, lanes, channels, {value_.block(first_key, keys), padded, 1}, queries_.grad_output_t, lanes,
            grad_probability, lanes, false);
    if (p.l2) l2_key_bias<T>(key_bias_, key, keys, plan_, p.scale);
    score_tangent_.products(x, queries_.query_t, key, first_key, keys);
    const T* table = tables_.head(job.head);
    for (int64_t lane = 0; lane < lanes; lane += kLanes<T>) {
      const LaneWeights<T> weights(queries_, table, index_, p.l2 ? key_bias_.data() : nullptr, lane);
      const Vector<T> d = load(d_ + lane);
      Vector<T> d_rest = load(d_rest_ + lane), r = load(r_ + lane), t = load(t_ + lane);
      for (int64_t j = 0; j < keys; ++j) {
        const int64_t at = j * lanes + lane;
        const Vector<T> prob = weights(load(probability + at), first_key, j), centred = load(grad_probability + at) - d;
        const Vector<T> value = score_tangent_.read(x, index_, first_key, j, lane);
        const Vector<T> weighted = prob * value;
        d_rest += prob * centred;
        r += weighted;
        t += weighted * centred;
        store(probability + at, prob);
        store(grad_probability + at, centred);
        store(x + at, value);
      }
      if (!sum_rows) continue;
      store(d_rest_ + lane, d_rest);
      store(r_ + lane, r);
      store(t_ + lane, t);
    }
  }

  // Row sums: what D as it comes from the output lacks, r, t; and the rows w = P gV, to which dO_bar is added later.
  void first_pass(const DenseJob& job, int64_t count) {
    const int64_t lanes = queries_.lanes;
    for (Buffer<T>* sums : {&d_rest_, &r_, &t_}) std::fill_n(sums->data(), lanes, T(0));
    for (int64_t k = 0; k < plan_.keys; k += plan_.block_keys) {
      const int64_t keys = std::min(plan_.block_keys, plan_.keys - k);
      scores(job, k, keys, true);
      if (a_.cot_value) grad_grad_output_.add(probability_ + kept(k), count, keys, cot_value_.block(k, keys), k > 0);
    }
    if (a_.cot_value) {
      const T* w_t = grad_grad_output_.by_lanes(count, transposed_);
      dot_lanes<T>(score_bar_sum_, queries_.grad_output_t, w_t, plan_.channels, lanes);
    }
    // For l2 the largest part of X is constant along a row (it is none of X as a product of differences): r again, of
    // what is left.
    for (int64_t lane = 0; lane < lanes; lane += kLanes<T>) {
      Vector<T> rest{};
      for (int64_t j = 0; keep_ && a_.problem.l2 && j < plan_.keys; ++j) {
        rest += load(probability_ + j * lanes + lane) * (load(x_ + j * lanes + lane) - load(r_ + lane));
      }
      store(r_rest_ + lane, rest);
    }
    for (int64_t i = 0; i < lanes; ++i) {
      t_[i] -= r_[i] * d_rest_[i];
      if (a_.cot_value) t_[i] += score_bar_sum_[i];
      d_rest_[i] -= queries_.grad_lse[i];
    }
  }

  void store_means(const DenseJob& job, int64_t first, int64_t count) {
    RowCursor row(a_.grad_grad_lse, job, plan_.window_x, first);
    for (int64_t i = 0; i < count; ++i, ++row) static_cast<T*>(a_.grad_grad_lse.data)[row.offset] = r_[i] + r_rest_[i];
  }

  void second_pass(const DenseJob& job, const DenseShare<T>& share, int64_t member, int64_t first, int64_t count,
                   int64_t first_key, int64_t keys) {
    const bool first_queries = first == 0 && member == 0, first_keys = first_key == share.key_begin;
    T* grad_table = share.want_query_side ? table_gradient_.data(member) : nullptr;
    const int64_t lanes = queries_.lanes, padded = plan_.padded, channels = plan_.channels;
    const Problem& p = a_.problem;
    if (!keep_ || !share.want_query_side) scores(job, first_key, keys, false);
    T* probability = probability_ + kept(first_key);
    T* grad_score = grad_probability_ + kept(first_key);  // dP - D becomes dS
    T* value_weight = x_ + kept(first_key);               // X becomes P (X - r)
    T* score_bar = scratch_;                              // G becomes Sb
    if (a_.cot_value) {
      gemm<T>(keys, lanes, channels, {cot_value_.block(first_key, keys), padded, 1}, queries_.grad_output_t, lanes,
              score_bar, lanes, false);
    }
    for (int64_t lane = 0; lane < lanes; lane += kLanes<T>) {
      const Vector<T> d_rest = load(d_rest_ + lane), r = load(r_ + lane), t = load(t_ + lane);
      const Vector<T> r_rest = load(r_rest_ + lane);
      Vector<T> score_bar_sum = load(score_bar_sum_ + lane), grad_score_sum = load(grad_score_sum_ + lane);
      for (int64_t j = 0; j < keys; ++j) {
        const int64_t at = j * lanes + lane;
        const Vector<T> prob = load(probability + at), centred = load(grad_score + at) - d_rest;
        const Vector<T> x = load(value_weight + at) - r - r_rest;
        Vector<T> inner = x * centred - t;
        if (a_.cot_value) inner += load(score_bar + at);
        const Vector<T> bar = prob * inner, grad = prob * centred;
        if (p.l2) score_bar_sum += bar, grad_score_sum += grad;
        store(score_bar + at, bar);
        store(grad_score + at, grad);
        store(value_weight + at, prob * x);
        if (grad_table != nullptr) index_.add(grad_table, first_key + j, lane, bar);
      }
      store(score_bar_sum_ + lane, score_bar_sum);
      store(grad_score_sum_ + lane, grad_score_sum);
    }
    const T* key = key_.block(first_key, keys);
    const T* cot_key = a_.cot_key ? score_tangent_.cot_key.block(first_key, keys) : nullptr;
    if (share.want_query_side && a_.grad_grad_output) {
      grad_grad_output_.add(value_weight, count, keys, value_.block(first_key, keys), a_.cot_value || !first_keys);
    }
    if (share.want_query_side && a_.grad_query) {
      grad_query_.add(score_bar, count, keys, key, !first_keys);
      if (cot_key) grad_query_.add(grad_score, count, keys, cot_key, true);
    }
    if (!share.want_key_side) return;
    if (grad_value_) {
      gemm<T>(keys, padded, count, {value_weight, lanes, 1}, queries_.grad_output, padded, grad_value_.row(first_key),
              grad_value_.stride(), !first_queries);
    }
    if (!grad_key_) return;
    T* grad_key = grad_key_.row(first_key);
    const int64_t stride = grad_key_.stride();
    gemm<T>(keys, padded, count, {score_bar, lanes, 1}, queries_.query, padded, grad_key, stride, !first_queries);
    if (a_.cot_query) {
      gemm<T>(keys, padded, count, {grad_score, lanes, 1}, score_tangent_.cot_query, padded, grad_key, stride, true);
    }
    if (!p.l2) return;
    const T factor = T(p.dot_scale()) * kLog2E<T>;
    for (int64_t j = 0; j < keys; ++j) {
      subtract_row<T>(grad_key + j * stride, key + j * padded, sum_row(score_bar + j * lanes, count) * factor, channels);
      if (cot_key == nullptr) continue;
      subtract_row<T>(grad_key + j * stride, cot_key + j * padded, sum_row(grad_score + j * lanes, count) * factor,
                      channels);
    }
  }

  const Arguments& a_;
  const DensePlan<T>& plan_;
  const DenseTables<T>& tables_;
  const bool keep_;
  WindowsInstead<T, NeighborhoodDoubleBackward<T>> windows_;
  Origin<T> key_origin_, value_origin_;
  BackwardQueries<T> queries_;
  KeyOperand<T> key_, value_, cot_value_;
  ScoreTangent<T> score_tangent_;
  KeyGradient<T> grad_key_, grad_value_;
  DenseTableGradient<T> table_gradient_;
  TableIndex<T> index_;
  Buffer<T> probability_, grad_probability_, x_, scratch_, output_t_, transposed_;
  QuerySums<T> grad_grad_output_, grad_query_;
  Buffer<T> d_, d_rest_, r_, r_rest_, t_, score_bar_sum_, grad_score_sum_, key_bias_;
};

template <class T>
void dense_double_backward(const Arguments& a, HeadRange heads) {
  const Problem& p = a.problem;
  // Fewer queries at once where that lets a whole row of scores stay in the cache.
  const bool many_keys = DensePlan<T>(p, heads, 1, 1).keys > 256;
  const DensePlan<T> plan(p, heads, many_keys || p.head_dim > 128 ? 32 : 64, 128);
  const auto tables = DenseTables<T>::scores(a.bias, plan);
  const auto cot_tables = DenseTables<T>::cotangents(a.cot_bias, plan);
  run_dense_gradients<T>(a, plan, kDoubleBackwardCost, [&](int64_t keys_at_once) {
    return DenseDoubleBackward<T>(a, plan, tables, cot_tables, keys_at_once);
  });
}

}  // namespace natten_ext::NATTEN_EXT_ISA
