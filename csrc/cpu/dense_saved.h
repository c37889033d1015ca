// P and X of the dense kernels' blocks of scores: what all orders after the forward compute first.
#pragma once

#include "dense_tables.h"

namespace natten_ext::NATTEN_EXT_ISA {

// What the forward knew of one block of queries.
template <class T>
class SavedQueries {
 public:
  // Base of lanes without a query: makes their P vanish.
  static constexpr T kNoQuery = std::numeric_limits<T>::infinity();

  SavedQueries(const Arguments& a, const DensePlan<T>& plan)
      : a_(a),
        plan_(plan),
        query(plan.block_queries * plan.padded),
        query_t(plan.padded * plan.block_queries),
        base(plan.block_queries),
        log_sum(plan.block_queries) {}

  // The origin is that of the job's keys.
  void load(const DenseJob& job, int64_t first, int64_t count, const T* key_origin) {
    const Problem& p = a_.problem;
    pack_queries<T>(query, query_t, a_.query, plan_, job, first, count, T(p.dot_scale()) * kLog2E<T>,
                    p.l2 ? key_origin : nullptr);
    RowCursor lse = lse_cursor(p, job, plan_.window_x, first);
    for (int64_t i = 0; i < count; ++i, ++lse) {
      const T* parts = static_cast<const T*>(a_.lse) + lse.offset;
      base[i] = parts[0];
      log_sum[i] = parts[p.rows()];
    }
    const int64_t lanes = round_up_to_lanes<T>(count);
    std::fill(base + count, base + lanes, kNoQuery);
    std::fill(log_sum + count, log_sum + lanes, T(0));
  }

 private:
  const Arguments& a_;
  const DensePlan<T>& plan_;

 public:
  Buffer<T> query, query_t;  // times a log2(e)
  Buffer<T> base, log_sum;   // the two parts of lse
};

// P of one vector of queries. `table` and `key_bias` may be null.
template <class T>
class LaneWeights {
 public:
  LaneWeights(const SavedQueries<T>& queries, const T* table, const TableIndex<T>& index, const T* key_bias, int64_t lane)
      : base_(load(queries.base + lane)),
        log_sum_(load(queries.log_sum + lane)),
        table_(table),
        key_bias_(key_bias),
        index_(index),
        lane_(lane) {}

  // From the product with key j of a block that begins at first_key.
  NATTEN_EXT_INLINE Vector<T> operator()(Vector<T> score, int64_t first_key, int64_t j) const {
    if (table_ != nullptr) score += index_.read(table_, first_key + j, lane_);
    if (key_bias_ != nullptr) score += broadcast(key_bias_[j]);
    return exp2(score - base_ - log_sum_);
  }

 private:
  const Vector<T> base_, log_sum_;
  const T *const table_, *const key_bias_;
  const TableIndex<T>& index_;
  const int64_t lane_;
};

// X = a (gQ K^T + Q gK^T) + gbias (l2: - a gK.K per key), the derivative of the scores along (gQ, gK, gbias).
template <class T>
class ScoreTangent {
 public:
  ScoreTangent(const Arguments& a, const DensePlan<T>& plan, const DenseTables<T>& tables)
      : a_(a),
        plan_(plan),
        tables_(tables),
        cot_query(a.cot_query ? plan.block_queries * plan.padded : 0),
        cot_key(a.cot_key, plan),
        cot_query_t_(a.cot_query ? plan.padded * plan.block_queries : 0),
        key_x_(plan.block_keys) {}

  void start(const DenseJob& job) {
    cot_key.start(job);
    table_ = tables_.head(job.head);
  }
  void load_queries(const DenseJob& job, int64_t first, int64_t count) {
    lanes_ = round_up_to_lanes<T>(count);
    if (!a_.cot_query) return;
    pack_queries<T>(cot_query, cot_query_t_, a_.cot_query, plan_, job, first, count,
                    T(a_.problem.dot_scale()) * kLog2E<T>);
  }
  // The products of a block of scores, of which X is read.
  void products(T* x, const T* query_t, const T* key, int64_t first_key, int64_t keys) {
    const int64_t lanes = lanes_, padded = plan_.padded, channels = plan_.channels;
    if (a_.cot_query) gemm<T>(keys, lanes, channels, {key, padded, 1}, cot_query_t_, lanes, x, lanes, false);
    if (!a_.cot_key) return;
    const T* rows = cot_key.block(first_key, keys);
    gemm<T>(keys, lanes, channels, {rows, padded, 1}, query_t, lanes, x, lanes, static_cast<bool>(a_.cot_query));
    for (int64_t j = 0; a_.problem.l2 && j < keys; ++j) {
      key_x_[j] = T(a_.problem.dot_scale()) * dot_row(key + j * padded, rows + j * padded, channels);
    }
  }
  // X of key j of a block that begins at first_key, and one vector of queries.
  NATTEN_EXT_INLINE Vector<T> read(const T* x, const TableIndex<T>& index, int64_t first_key, int64_t j, int64_t lane) const {
    Vector<T> value{};
    if (a_.cot_query || a_.cot_key) value = load(x + j * lanes_ + lane) * kLn2<T>;  // queries carry log2(e)
    if (table_ != nullptr) value += index.read(table_, first_key + j, lane);
    if (a_.problem.l2 && a_.cot_key) value -= broadcast(key_x_[j]);
    return value;
  }

 private:
  const Arguments& a_;
  const DensePlan<T>& plan_;
  const DenseTables<T>& tables_;
  const T* table_ = nullptr;
  int64_t lanes_ = 0;  // of the block of queries

 public:
  Buffer<T> cot_query;  // times a log2(e)
  KeyOperand<T> cot_key;

 private:
  Buffer<T> cot_query_t_, key_x_;
};

}  // namespace natten_ext::NATTEN_EXT_ISA
