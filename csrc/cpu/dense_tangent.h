// Tangent of the dense kernels: the derivative of the output along tangents (gQ, gK, gV, gbias) of the inputs. With X as
// in dense_saved.h:
//   r = sum P X      tangent = sum P (X - r) V + sum P gV
// and r is that of the log-sum-exp.
// Q, K and V are counted from the places in origin.h.
#pragma once

#include "dense_query_sums.h"
#include "dense_saved.h"
#include "dense_tasks.h"
#include "dense_windows.h"
#include "neighborhood_tangent.h"

namespace natten_ext::NATTEN_EXT_ISA {

template <class T>
class DenseTangent {
 public:
  // Blocks of scores of a whole row of keys are kept up to this size, so that r is known before it is used.
  static constexpr int64_t kKeepAtMost = (1 << 18) / sizeof(T);

  DenseTangent(const Arguments& a, const DensePlan<T>& plan, const DenseTables<T>& tables, const DenseTables<T>& cot_tables)
      : a_(a),
        plan_(plan),
        tables_(tables),
        moves_(a.cot_query || a.cot_key || a.cot_bias),
        keep_(moves_ && plan.keys * plan.block_queries <= kKeepAtMost),
        windows_(a, plan),
        key_origin_(a.key, a.problem, plan.key_heads()),
        value_origin_(a.value, a.problem, plan.key_heads()),
        queries_(a, plan),
        key_(a.key, plan, &key_origin_),
        value_(moves_ ? a.value : View{}, plan, &value_origin_),
        cot_value_(a.cot_value, plan),
        score_tangent_(a, plan, cot_tables),
        index_(plan, tables.head(plan.heads.first) != nullptr),
        probability_(kept_keys() * plan.block_queries),
        x_(moves_ ? kept_keys() * plan.block_queries : 0),
        tangent_(plan, true),
        output_(plan, moves_ && !keep_),
        total_(plan.block_queries),
        mean_(plan.block_queries),
        rest_(plan.block_queries),
        key_bias_(plan.block_keys) {}

  // Queries [begin, end) of one job.
  void run(const DenseJob& job, int64_t begin, int64_t end) {
    if (windows_.run(job)) return;
    for (KeyOperand<T>* operand : {&key_, &value_, &cot_value_}) operand->start(job);
    score_tangent_.start(job);
    for (int64_t first = begin; first < end; first += plan_.block_queries) {
      block(job, first, std::min(plan_.block_queries, end - first));
    }
  }

  void prefetch(const DenseJob& job) const {
    for (const View* v : {&a_.query, &a_.key, &a_.value, &a_.cot_query, &a_.cot_key, &a_.cot_value}) {
      prefetch_rows(*v, plan_, job);
    }
  }

 private:
  int64_t kept_keys() const { return keep_ ? plan_.keys : plan_.block_keys; }
  int64_t kept(int64_t first_key) const { return keep_ ? first_key * lanes_ : 0; }

  void block(const DenseJob& job, int64_t first, int64_t count) {
    queries_.load(job, first, count, key_.origin());
    score_tangent_.load_queries(job, first, count);
    if (tables_.head(job.head) != nullptr) index_.start(first, count);
    lanes_ = round_up_to_lanes<T>(count);
    for (Buffer<T>* sums : {&total_, &mean_, &rest_}) std::fill_n(sums->data(), lanes_, T(0));
    const auto for_each_block = [&](const auto& visit) {
      for (int64_t k = 0; k < plan_.keys; k += plan_.block_keys) visit(k, std::min(plan_.block_keys, plan_.keys - k));
    };
    if (keep_) for_each_block([&](int64_t k, int64_t keys) { scores(job, k, keys); });
    for_each_block([&](int64_t k, int64_t keys) {
      if (!keep_) scores(job, k, keys);
      sum(count, k, keys);
    });
    T* rows = tangent_.rows(count);
    const T* output = moves_ && !keep_ ? output_.rows(count) : nullptr;
    for (int64_t i = 0; output != nullptr && i < count; ++i) {
      subtract_row<T>(rows + i * plan_.padded, output + i * plan_.padded, rest_[i] / total_[i], plan_.channels);
    }
    if (a_.grad_grad_output) unpack_rows<T>(rows, a_.grad_grad_output, plan_, job, plan_.window_x, first, count, 1);
    if (!a_.grad_grad_lse) return;
    RowCursor row(a_.grad_grad_lse, job, plan_.window_x, first);
    for (int64_t i = 0; i < count; ++i, ++row) {
      static_cast<T*>(a_.grad_grad_lse.data)[row.offset] = moves_ ? mean_[i] + rest_[i] / total_[i] : T(0);
    }
  }

  // P of one block of keys, and X less its mean: kept, or times P.
  void scores(const DenseJob& job, int64_t first_key, int64_t keys) {
    const int64_t lanes = lanes_, padded = plan_.padded;
    const Problem& p = a_.problem;
    T* probability = probability_ + kept(first_key);
    T* x = x_ + kept(first_key);
    const T* key = key_.block(first_key, keys);
    gemm<T>(keys, lanes, plan_.channels, {key, padded, 1}, queries_.query_t, lanes, probability, lanes, false);
    if (p.l2) l2_key_bias<T>(key_bias_, key, keys, plan_, p.scale);
    score_tangent_.products(x, queries_.query_t, key, first_key, keys);
    for (int64_t lane = 0; lane < lanes; lane += kLanes<T>) {
      const LaneWeights<T> weights(queries_, tables_.head(job.head), index_, p.l2 ? key_bias_.data() : nullptr, lane);
      Vector<T> total{}, moment{};
      for (int64_t j = 0; j < keys; ++j) {
        const int64_t at = j * lanes + lane;
        const Vector<T> prob = weights(load(probability + at), first_key, j);
        store(probability + at, prob);
        if (!moves_) continue;
        const Vector<T> value = score_tangent_.read(x, index_, first_key, j, lane);
        total += prob;
        moment += prob * value;
        store(x + at, value);
      }
      if (moves_) centre(x + lane, probability + lane, keys, lane, total, moment);
    }
  }

  // The mean is that of the first keys with any weight; what it lacks of r is summed.
  NATTEN_EXT_INLINE void centre(T* x, const T* probability, int64_t keys, int64_t lane, Vector<T> total, Vector<T> moment) {
    const int64_t lanes = lanes_;
    const Vector<T> before = load(total_ + lane), none{};
    const Vector<T> mean = before > none ? load(mean_ + lane) : total > none ? moment / total : none;
    Vector<T> rest{};  // of this block, which rounds less than to go on adding up the row
    for (int64_t j = 0; j < keys; ++j) {
      const Vector<T> value = load(x + j * lanes) - mean, weighted = load(probability + j * lanes) * value;
      rest += weighted;
      store(x + j * lanes, keep_ ? value : weighted);
    }
    store(total_ + lane, before + total);
    store(mean_ + lane, mean);
    store(rest_ + lane, load(rest_ + lane) + rest);
  }

  // Adds the products with the values.
  void sum(int64_t count, int64_t first_key, int64_t keys) {
    const int64_t lanes = lanes_;
    const T* probability = probability_ + kept(first_key);
    T* x = x_ + kept(first_key);
    if (a_.cot_value) tangent_.add(probability, count, keys, cot_value_.block(first_key, keys), first_key > 0);
    if (!moves_) return;
    for (int64_t lane = 0; keep_ && lane < lanes; lane += kLanes<T>) {
      const Vector<T> rest = load(rest_ + lane) / load(total_ + lane);
      for (int64_t at = lane; at < keys * lanes; at += lanes) store(x + at, load(probability + at) * (load(x + at) - rest));
    }
    const T* value = value_.block(first_key, keys);
    tangent_.add(x, count, keys, value, first_key > 0 || a_.cot_value);
    if (!keep_) output_.add(probability, count, keys, value, first_key > 0);
  }

  const Arguments& a_;
  const DensePlan<T>& plan_;
  const DenseTables<T>& tables_;
  const bool moves_, keep_;  // whether scores have a tangent; whether a row of blocks is kept
  int64_t lanes_ = 0;        // of the block of queries
  WindowsInstead<T, NeighborhoodTangent<T>> windows_;
  Origin<T> key_origin_, value_origin_;
  SavedQueries<T> queries_;
  KeyOperand<T> key_, value_, cot_value_;
  ScoreTangent<T> score_tangent_;
  TableIndex<T> index_;
  Buffer<T> probability_, x_;
  QuerySums<T> tangent_, output_;  // results; sum P V where it is needed
  Buffer<T> total_, mean_, rest_;  // sum of P so far; r in two parts
  Buffer<T> key_bias_;
};

template <class T>
void dense_tangent(const Arguments& a, HeadRange heads) {
  const Problem& p = a.problem;
  // Fewer queries at once where that lets a whole row of scores stay in the cache.
  const int64_t keys = DensePlan<T>(p, heads, 1, 1).keys;
  const bool fewer = keys * 64 > DenseTangent<T>::kKeepAtMost && keys * 32 <= DenseTangent<T>::kKeepAtMost;
  const DensePlan<T> plan(p, heads, fewer || p.head_dim > 128 ? 32 : 64, 128);
  const auto tables = DenseTables<T>::scores(a.bias, plan);
  const auto cot_tables = DenseTables<T>::cotangents(a.cot_bias, plan);
  run_dense_queries<T>(plan, kTangentCost, [&] { return DenseTangent<T>(a, plan, tables, cot_tables); });
}

}  // namespace natten_ext::NATTEN_EXT_ISA
