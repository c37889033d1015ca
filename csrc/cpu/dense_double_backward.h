// Double backward of the dense kernels (docs/double_backward.md). With gQ, gK, gV, gbias the cotangents of the
// first gradients and a the factor of q.k:
//   X = a (gQ K^T + Q gK^T) + gbias   (l2: - a gK.K per key)      G = dO gV^T
//   first pass, per row:   r = sum P X   e = sum P X dP   w = P gV   u = (P X) V   t = e - 2 D r + dO.w
//   second pass:   Sb = P (X (dP - D) - r dP + G - t)   dS = P (dP - D)
//     q_bar = a (Sb K + dS gK)     k_bar = a (Sb^T Q + dS^T gQ)   (l2: - a (K colsum(Sb) + gK colsum(dS)))
//     v_bar = (P (X - r))^T dO     dO_bar = u - r O + w           table: sum of Sb over equal offsets
#pragma once

#include "dense_backward.h"

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
        cot_tables_(cot_tables),
        has_x_(a.cot_query || a.cot_key || a.cot_bias),
        keep_(plan.keys * plan.block_queries <= kKeepAtMost),
        queries_(a, plan),
        key_(a.key, plan),
        value_(a.value, plan),
        cot_key_(a.cot_key, plan),
        cot_value_(a.cot_value, plan),
        grad_key_(a.grad_key, plan, keys_at_once),
        grad_value_(a.grad_value, plan, keys_at_once),
        table_gradient(plan, static_cast<bool>(a.grad_bias)),
        index_(plan, tables.head(plan.heads.first) != nullptr),
        cot_query_(plan.block_queries * plan.padded),
        cot_query_t_(plan.padded * plan.block_queries),
        probability_(kept_keys() * plan.block_queries),
        grad_probability_(kept_keys() * plan.block_queries),
        x_(kept_keys() * plan.block_queries),
        scratch_(plan.block_keys * plan.block_queries),
        pv_(plan.block_queries * plan.padded),
        pxv_(plan.block_queries * plan.padded),
        grad_query_(plan.block_queries * plan.padded),
        r_(plan.block_queries),
        e_(plan.block_queries),
        t_(plan.block_queries),
        key_bias_(plan.block_keys),
        key_x_(plan.block_keys) {}

  void prefetch(const DenseJob& job) const {
    for (const View* v : {&a_.query, &a_.key, &a_.value, &a_.output, &a_.grad_output, &a_.cot_query, &a_.cot_key,
                          &a_.cot_value}) {
      prefetch_rows(*v, plan_, job);
    }
  }

  void run(const DenseJob& job, const DenseShare& share) {
    for (KeyOperand<T>* operand : {&key_, &value_, &cot_key_, &cot_value_}) operand->start(job);
    grad_key_.start(job, share.key_begin);
    grad_value_.start(job, share.key_begin);
    for (int64_t first = share.query_begin; first < share.query_end; first += plan_.block_queries) {
      const int64_t count = std::min(plan_.block_queries, share.query_end - first);
      load_queries(job, first, count);
      first_pass(job, count);
      if (share.want_query_side && a_.grad_grad_output) store_grad_output(job, first, count);
      for (int64_t k = share.key_begin; k < share.key_end; k += plan_.block_keys) {
        second_pass(job, share, first, count, k, std::min(plan_.block_keys, share.key_end - k));
      }
      if (share.want_query_side && a_.grad_query) {
        unpack_rows<T>(grad_query_, a_.grad_query, plan_, job, plan_.window_x, first, count, a_.problem.dot_scale());
      }
    }
    if (!share.want_key_side) return;
    if (grad_key_) grad_key_.finish(share.key_end, kLn2<T>);
    if (grad_value_) grad_value_.finish(share.key_end, 1);
  }

 private:
  int64_t kept_keys() const { return keep_ ? plan_.keys : plan_.block_keys; }
  int64_t kept(int64_t first_key) const { return keep_ ? first_key * plan_.block_queries : 0; }

  void load_queries(const DenseJob& job, int64_t first, int64_t count) {
    queries_.load(job, first, count);
    if (a_.cot_query) {
      pack_queries<T>(cot_query_, cot_query_t_, a_.cot_query, plan_, job, first, count,
                      T(a_.problem.dot_scale()) * kLog2E<T>);
    }
    if (tables_.head(job.head) != nullptr) index_.start(first, count);
  }

  // P, dP and X of one block of keys; adds to the row sums r and e if asked to.
  void scores(const DenseJob& job, int64_t first_key, int64_t keys, bool sum_rows) {
    const int64_t lanes = plan_.block_queries, padded = plan_.padded, channels = plan_.channels;
    const Problem& p = a_.problem;
    T* probability = probability_ + kept(first_key);
    T* grad_probability = grad_probability_ + kept(first_key);
    T* x = x_ + kept(first_key);
    const T* key = key_.block(first_key, keys);
    gemm<T>(keys, lanes, channels, {key, padded, 1}, queries_.query_t, lanes, probability, lanes, false);
    gemm<T>(keys, lanes, channels, {value_.block(first_key, keys), padded, 1}, queries_.grad_output_t, lanes,
            grad_probability, lanes, false);
    if (p.l2) l2_key_bias<T>(key_bias_, key, keys, plan_, p.scale);
    if (a_.cot_query) gemm<T>(keys, lanes, channels, {key, padded, 1}, cot_query_t_, lanes, x, lanes, false);
    if (a_.cot_key) {
      const T* cot_key = cot_key_.block(first_key, keys);
      gemm<T>(keys, lanes, channels, {cot_key, padded, 1}, queries_.query_t, lanes, x, lanes,
              static_cast<bool>(a_.cot_query));
      for (int64_t j = 0; p.l2 && j < keys; ++j) {
        key_x_[j] = T(p.dot_scale()) * dot_row(key + j * padded, cot_key + j * padded, channels);
      }
    }
    const bool products = a_.cot_query || a_.cot_key, shifted = p.l2 && a_.cot_key;
    const T* table = tables_.head(job.head);
    const T* cot_table = cot_tables_.head(job.head);
    for (int64_t lane = 0; lane < lanes; lane += kLanes<T>) {
      const Vector<T> base = load(queries_.base + lane), log_sum = load(queries_.log_sum + lane);
      Vector<T> r = load(r_ + lane), e = load(e_ + lane);
      for (int64_t j = 0; j < keys; ++j) {
        const int64_t at = j * lanes + lane;
        Vector<T> score = load(probability + at);
        if (table != nullptr) score += index_.read(table, first_key + j, lane);
        if (p.l2) score += broadcast(key_bias_[j]);
        const Vector<T> prob = exp2(score - base - log_sum);
        Vector<T> value{};
        if (products) value = load(x + at) * kLn2<T>;  // the packed queries carry log2(e)
        if (cot_table != nullptr) value += index_.read(cot_table, first_key + j, lane);
        if (shifted) value -= broadcast(key_x_[j]);
        const Vector<T> weighted = prob * value;
        r += weighted;
        e += weighted * load(grad_probability + at);
        store(probability + at, prob);
        store(x + at, value);
        store(scratch_ + at, weighted);
      }
      if (!sum_rows) continue;
      store(r_ + lane, r);
      store(e_ + lane, e);
    }
  }

  // Row sums r, e, t and the rows w = P gV (pv_) and u = (P X) V (pxv_).
  void first_pass(const DenseJob& job, int64_t count) {
    const int64_t lanes = plan_.block_queries, padded = plan_.padded;
    std::fill(r_.data(), r_ + lanes, T(0));
    std::fill(e_.data(), e_ + lanes, T(0));
    for (int64_t k = 0; k < plan_.keys; k += plan_.block_keys) {
      const int64_t keys = std::min(plan_.block_keys, plan_.keys - k);
      scores(job, k, keys, true);
      if (a_.cot_value) {
        gemm<T>(count, padded, keys, {probability_ + kept(k), 1, lanes}, cot_value_.block(k, keys), padded, pv_,
                padded, k > 0);
      }
      if (has_x_ && a_.grad_grad_output) {
        gemm<T>(count, padded, keys, {scratch_, 1, lanes}, value_.block(k, keys), padded, pxv_, padded, k > 0);
      }
    }
    for (int64_t i = 0; i < lanes; ++i) {
      t_[i] = e_[i] - 2 * queries_.delta[i] * r_[i];
      if (a_.cot_value && i < count) t_[i] += dot_row(queries_.grad_output + i * padded, pv_ + i * padded, plan_.channels);
    }
  }

  void store_grad_output(const DenseJob& job, int64_t first, int64_t count) {
    const int64_t padded = plan_.padded;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = i * padded;
      for (int64_t c = 0; c < padded; ++c) {
        T value = 0;
        if (has_x_) value = pxv_[row + c] - r_[i] * queries_.output[row + c];
        if (a_.cot_value) value += pv_[row + c];
        pxv_[row + c] = value;
      }
    }
    unpack_rows<T>(pxv_, a_.grad_grad_output, plan_, job, plan_.window_x, first, count, 1);
  }

  void second_pass(const DenseJob& job, const DenseShare& share, int64_t first, int64_t count, int64_t first_key,
                   int64_t keys) {
    const bool first_queries = first == share.query_begin, first_keys = first_key == share.key_begin;
    T* grad_table = share.want_query_side ? table_gradient.data() : nullptr;
    const int64_t lanes = plan_.block_queries, padded = plan_.padded, channels = plan_.channels;
    const Problem& p = a_.problem;
    if (!keep_) scores(job, first_key, keys, false);
    T* probability = probability_ + kept(first_key);
    T* grad_score = grad_probability_ + kept(first_key);  // dP becomes dS
    T* value_weight = x_ + kept(first_key);               // X becomes P (X - r)
    T* score_bar = scratch_;                              // G becomes Sb
    if (a_.cot_value) {
      gemm<T>(keys, lanes, channels, {cot_value_.block(first_key, keys), padded, 1}, queries_.grad_output_t, lanes,
              score_bar, lanes, false);
    }
    for (int64_t lane = 0; lane < lanes; lane += kLanes<T>) {
      const Vector<T> delta = load(queries_.delta + lane), r = load(r_ + lane), t = load(t_ + lane);
      for (int64_t j = 0; j < keys; ++j) {
        const int64_t at = j * lanes + lane;
        const Vector<T> prob = load(probability + at), dp = load(grad_score + at), x = load(value_weight + at);
        Vector<T> inner = x * (dp - delta) - r * dp - t;
        if (a_.cot_value) inner += load(score_bar + at);
        const Vector<T> bar = prob * inner;
        store(score_bar + at, bar);
        store(grad_score + at, prob * (dp - delta));
        store(value_weight + at, prob * (x - r));
        if (grad_table != nullptr) index_.add(grad_table, first_key + j, lane, bar);
      }
    }
    const T* key = key_.block(first_key, keys);
    const T* cot_key = a_.cot_key ? cot_key_.block(first_key, keys) : nullptr;
    if (share.want_query_side && a_.grad_query) {
      gemm<T>(count, padded, keys, {score_bar, 1, lanes}, key, padded, grad_query_, padded, !first_keys);
      if (cot_key) gemm<T>(count, padded, keys, {grad_score, 1, lanes}, cot_key, padded, grad_query_, padded, true);
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
      gemm<T>(keys, padded, count, {grad_score, lanes, 1}, cot_query_, padded, grad_key, stride, true);
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
  const DenseTables<T>&tables_, &cot_tables_;
  const bool has_x_, keep_;
  BackwardQueries<T> queries_;
  KeyOperand<T> key_, value_, cot_key_, cot_value_;
  KeyGradient<T> grad_key_, grad_value_;

 public:
  DenseTableGradient<T> table_gradient;

 private:
  TableIndex<T> index_;
  Buffer<T> cot_query_, cot_query_t_, probability_, grad_probability_, x_, scratch_, pv_, pxv_, grad_query_;
  Buffer<T> r_, e_, t_, key_bias_, key_x_;
};

template <class T>
void dense_double_backward(const Arguments& a, HeadRange heads) {
  const Problem& p = a.problem;
  // Fewer queries at once where that lets a whole row of scores stay in the cache.
  const bool many_keys = DensePlan<T>(p, heads, 1, 1).keys > 256;
  const DensePlan<T> plan(p, heads, many_keys || p.head_dim > 128 ? 32 : 64, 128);
  const DenseTables<T> tables(a.bias, plan, kLog2E<T>, DenseTables<T>::kMasked);
  const DenseTables<T> cot_tables(a.cot_bias, plan, 1, 0);
  run_dense_gradients<T>(a, plan, [&](int64_t keys_at_once) {
    return DenseDoubleBackward<T>(a, plan, tables, cot_tables, keys_at_once);
  });
}

}  // namespace natten_ext::NATTEN_EXT_ISA
