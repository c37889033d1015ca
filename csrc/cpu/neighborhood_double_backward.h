// Double backward of neighborhood attention; the formulas are those of dense_double_backward.h. A window's scores are
// few, so all of them stay in the cache between the row sums and their use.
//
// For l2, rows of queries have two more channels than the tensors: (1, 0) for Q and (0, 1) for gQ. The first one
// brings the products per key into the scores, as in the forward; both bring colsum(Sb) and colsum(dS) into k_bar.
#pragma once

#include <array>

#include "neighborhood_backward.h"

namespace natten_ext::NATTEN_EXT_ISA {

template <class T>
class NeighborhoodDoubleBackward {
 public:
  static constexpr int L = kLanes<T>;

  explicit NeighborhoodDoubleBackward(const Arguments& a)
      : a_(a), rows_(a, a.problem.l2 ? 1 : 0, true), backward_(a), cotangents_(a), table_gradient_(a) {
    for (StripResults<T>* results : {&grad_grad_output_, &grad_query_}) results->resize(a.problem.head_dim);
  }

  // As NeighborhoodBackward.
  void start(const PartialTables<T>& partial, int64_t first_head) { table_gradient_.start(partial, first_head); }
  void finish() { table_gradient_.flush(rows_); }
  void run(const NeighborhoodJob& new_job) {
    const ClassGeometry<T>& g = rows_.geometry;
    if (rows_.tables_differ(new_job)) table_gradient_.flush(rows_);
    const NeighborhoodJob& job = rows_.job;
    const bool new_geometry = rows_.start(new_job);
    if (new_geometry) resize();
    table_gradient_.open(g);
    grad_key_.start(g, job, rows_.query_channels, new_geometry);
    grad_value_.start(g, job, rows_.channels, new_geometry);
    for_each_attending_group(g, job, [&](const RowGroup& group, Row next) {
      rows_.load_keys(group, [&](Row row) { cotangents_.load_keys(rows_, row); });
      grad_key_.open(group);
      grad_value_.open(group);
      for_each_member(a_.problem, rows_, [&](int64_t member) { run_group(group, member); });
      close(next);
    });
  }

 private:
  // What one window position passes from the scores to the gradients.
  enum Weight { kProbability, kGradScore, kX, kScoreBar, kValueWeight, kWeights };

  void resize() {
    const ClassGeometry<T>& g = rows_.geometry;
    backward_.resize(g, rows_.channels);
    cotangents_.resize(rows_);
    for (StripWeights<T>& weights : weights_) weights.resize(g);
    for (RowWeights<T>* weights : {&score_bar_rows_, &grad_score_rows_, &value_rows_}) weights->resize(g);
  }

  // Of one head: its gradients, and its share of those of the keys.
  void run_group(const RowGroup& group, int64_t member) {
    const ClassGeometry<T>& g = rows_.geometry;
    rows_.load_queries(group);
    backward_.load(rows_, group);
    cotangents_.start(rows_);
    cotangents_.load_queries(rows_, group);
    grad_table_ = a_.grad_bias ? &table_gradient_.expanded[member] : nullptr;
    strange_ = backward_.strange;
    g.for_each_strip([&](int64_t begin, int64_t end) { strip(group, begin, end); });
    gather(group);
  }

  void strip(const RowGroup& group, int64_t begin, int64_t end) {
    const ClassGeometry<T>& g = rows_.geometry;
    const auto product = [&](const RowRing<T>& key, Weight to) {
      score_strip(g, group, begin, end, backward_.grad_output, key, rows_.channels, weights_[to], false);
    };
    score_strip(g, group, begin, end, rows_.query, rows_.key, rows_.score_channels, weights_[kProbability], false,
                rows_.table());
    product(rows_.value, kGradScore);
    cotangents_.products(rows_, group, begin, end, weights_[kX]);
    if (a_.cot_value) product(cotangents_.value, kScoreBar);

    const auto gather = [&](Weight weight, const RowRing<T>& value, const StripResults<T>& out, bool add) {
      gather_keys<T>(g, group, begin, end, weights_[weight], value, rows_.channels, terms_, out, add);
    };
    const auto for_each_block = [&](const auto& visit) {
      for (int64_t b = begin; b < end; ++b) {
        for (int r = 0; r < group.count; ++r) visit(r, b, b - begin);
      }
    };
    for_each_block([&](int r, int64_t b, int64_t slot) { row_sums(group, r, b, slot); });
    const bool own = rows_.job.owns_any(group.row(0), group.count);
    if (a_.cot_value) gather(kProbability, cotangents_.value, grad_grad_output_, false);  // w so far
    for_each_block([&](int r, int64_t b, int64_t slot) { second_pass(group, r, b, slot); });
    if (a_.grad_grad_output && own) {
      gather(kValueWeight, rows_.value, grad_grad_output_, static_cast<bool>(a_.cot_value));
      for_each_block([&](int r, int64_t b, int64_t slot) {
        if (!rows_.job.template owns<L>(group.row(r), b)) return;
        rows_.transposer.unload(grad_grad_output_.row(slot, r), L, a_.grad_grad_output, rows_.job, group.row(r), b, broadcast(T(1)));
      });
    }
    if (a_.grad_grad_lse && own) {
      for_each_block([&](int r, int64_t b, int64_t slot) {
        if (!rows_.job.template owns<L>(group.row(r), b)) return;
        rows_.store_lanes(a_.grad_grad_lse, group.row(r), b, r_sum_[slot][r] + r_rest_[slot][r]);
      });
    }
    if (!a_.grad_query || !own) return;
    gather(kScoreBar, rows_.key, grad_query_, false);
    if (a_.cot_key) gather(kGradScore, cotangents_.key, grad_query_, true);
    for_each_block([&](int r, int64_t b, int64_t slot) {
      const Row row = group.row(r);
      if (!rows_.job.template owns<L>(row, b)) return;
      T* gradient = grad_query_.row(slot, r);
      if (a_.problem.l2) {
        rows_.subtract_own(gradient, rows_.query.row(row) + b * L, score_bar_sum_[slot][r]);
        if (a_.cot_query) rows_.subtract_own(gradient, cotangents_.query.row(row) + b * L, grad_score_sum_[slot][r]);
      }
      rows_.transposer.unload(gradient, L, a_.grad_query, rows_.job, row, b, broadcast(T(a_.problem.dot_scale())));
    });
  }

  // P, dP less D as it comes from the output, and X of one block; what that D lacks, r, and t without its last term.
  void row_sums(const RowGroup& group, int r, int64_t b, int64_t slot) {
    const ClassGeometry<T>& g = rows_.geometry;
    const int64_t n = group.key_rows(r) * g.kx * L, of_plane = group.rows(r) * g.kx * L;
    T* const probabilities = weights_[kProbability].block(r, slot);
    T* const values = weights_[kX].block(r, slot);
    T* const grad_scores = weights_[kGradScore].block(r, slot);
    const Vector<T> base = NATTEN_EXT_ISA::load(backward_.base[r] + b * L);
    const Vector<T> log_sum = NATTEN_EXT_ISA::load(backward_.log_sum[r] + b * L);
    const Vector<T> d = NATTEN_EXT_ISA::load(backward_.d[r] + b * L);
    Vector<T> d_rest{}, r_sum{}, t{};
    for (int64_t z = group.planes.start, i = 0; z < group.planes.end; ++z) {
      const T* const cot_table = cotangents_.table(g.query_blocks[b].table, group, r, z);
      const T* const of_keys = values + i;
      for (int64_t at = 0; at < of_plane; at += L, i += L) {
        const Vector<T> probability = exp2(NATTEN_EXT_ISA::load(probabilities + i) - base - log_sum);
        const Vector<T> centred = NATTEN_EXT_ISA::load(grad_scores + i) - d;
        const Vector<T> value = cotangents_.read(of_keys, cot_table, at);
        const Vector<T> weighted = probability * value;
        d_rest += probability * centred;
        r_sum += weighted;
        t += weighted * centred;
        store(probabilities + i, probability);
        store(grad_scores + i, centred);
        store(values + i, value);
      }
    }
    Vector<T> rest{};  // see DenseDoubleBackward::first_pass
    for (int64_t i = 0; a_.problem.l2 && i < n; i += L) {
      rest += NATTEN_EXT_ISA::load(probabilities + i) * (NATTEN_EXT_ISA::load(values + i) - r_sum);
    }
    d_rest_[slot][r] = d_rest - NATTEN_EXT_ISA::load(backward_.grad_lse[r] + b * L);
    r_sum_[slot][r] = r_sum;
    r_rest_[slot][r] = rest;
    t_[slot][r] = t - r_sum * d_rest;
    strange_ = strange_ || horizontal_sum<T>(r_sum * T(0)) != 0;
  }

  // Sb, dS and P (X - r) of one block, also to the group's rows of weights; the table's gradient.
  void second_pass(const RowGroup& group, int r, int64_t b, int64_t slot) {
    const ClassGeometry<T>& g = rows_.geometry;
    const Row row = group.row(r);
    const int64_t x = b * L;
    const Vector<T> d_rest = d_rest_[slot][r], r_sum = r_sum_[slot][r], r_rest = r_rest_[slot][r];
    Vector<T> t = t_[slot][r];
    if (a_.cot_value) t += backward_.dot(backward_.grad_output.row(row) + x, grad_grad_output_.row(slot, r), L);
    const bool to_table = grad_table_ != nullptr && rows_.job.template owns<L>(row, b);
    const T* const probabilities = weights_[kProbability].block(r, slot);
    const T* const values = weights_[kX].block(r, slot);
    T* const value_weights = weights_[kValueWeight].block(r, slot);
    T* const grad_scores = weights_[kGradScore].block(r, slot);
    T* const score_bars = weights_[kScoreBar].block(r, slot);
    Vector<T> score_bar_sum{}, grad_score_sum{};
    for (int64_t z = group.planes.start, i = 0, key = 0; z < group.planes.end; ++z) {
      T* grad_table = to_table ? grad_table_->row(g.query_blocks[b].table, group, r, z) - i : nullptr;
      for (const int64_t end = key + group.rows(r); key < end; ++key) {
        for (int64_t kx = 0; kx < g.kx; ++kx, i += L) {
          const Vector<T> probability = NATTEN_EXT_ISA::load(probabilities + i);
          const Vector<T> centred = NATTEN_EXT_ISA::load(grad_scores + i) - d_rest;
          const Vector<T> value = NATTEN_EXT_ISA::load(values + i) - r_sum - r_rest;
          Vector<T> inner = value * centred - t;
          if (a_.cot_value) inner += NATTEN_EXT_ISA::load(score_bars + i);  // G so far
          const Vector<T> score_bar = probability * inner, grad_score = probability * centred;
          score_bar_sum += score_bar;
          grad_score_sum += grad_score;
          store(score_bars + i, score_bar);
          store(grad_scores + i, grad_score);
          store(value_weights + i, probability * value);
          const int64_t at = key * g.weights_stride + kx * g.padded + x;
          store(score_bar_rows_.rows[r] + at, score_bar);
          store(grad_score_rows_.rows[r] + at, grad_score);
          store(value_rows_.rows[r] + at, probability * value);
          if (grad_table != nullptr) store(grad_table + i, NATTEN_EXT_ISA::load(grad_table + i) + score_bar);
        }
      }
    }
    score_bar_sum_[slot][r] = score_bar_sum;
    grad_score_sum_[slot][r] = grad_score_sum;
  }

  // The group's share of k_bar and v_bar.
  void gather(const RowGroup& group) {
    const ClassGeometry<T>& g = rows_.geometry;
    const auto run = [&](const RowWeights<T>& weights, const RowRing<T>& query, int64_t channels,
                         const RowRing<T>& gradient) {
      gatherer_.run(g, group, weights, query, channels, gradient, rows_.job, strange_);
    };
    if (a_.grad_key) {
      run(score_bar_rows_, rows_.query, rows_.query_channels, grad_key_.ring);
      if (a_.cot_query) run(grad_score_rows_, cotangents_.query, rows_.query_channels, grad_key_.ring);
      // colsum(dS) is wanted for the l2 term of gK even without gQ.
      else if (a_.cot_key && a_.problem.l2) add_column_sums(group);
    }
    if (a_.grad_value) run(value_rows_, backward_.grad_output, rows_.channels, grad_value_.ring);
  }

  void add_column_sums(const RowGroup& group) {
    for (int r = 0; r < group.count; ++r) {
      cotangents_.query.clear(group.row(r));
      cotangents_.fill_sum_channel(rows_, group.row(r));
    }
    gatherer_.run(rows_.geometry, group, grad_score_rows_, cotangents_.query, rows_.query_channels, grad_key_.ring, rows_.job,
                  false);
  }

  // Writes out the rows of k_bar and v_bar that the windows have passed.
  void close(Row first) {
    const int64_t stride = grad_key_.ring.stride();
    grad_key_.close(first, [&](Row row) {
      if (!a_.grad_key) return;
      T* gradient = grad_key_.ring.row(row);
      if (a_.problem.l2) {
        rows_.subtract_keys(gradient, gradient + rows_.channels * stride, row, rows_.key);
        if (a_.cot_key) rows_.subtract_keys(gradient, gradient + (rows_.channels + 1) * stride, row, cotangents_.key);
      }
      rows_.transposer.unload_row(gradient, stride, a_.grad_key, rows_.job, row, kLn2<T>);
    });
    grad_value_.close(first, [&](Row row) {
      if (!a_.grad_value) return;
      const RowRing<T>& ring = grad_value_.ring;
      rows_.transposer.unload_row(ring.row(row), ring.stride(), a_.grad_value, rows_.job, row, 1);
    });
  }

  const Arguments& a_;
  NeighborhoodRows<T> rows_;
  BackwardRows<T> backward_;
  CotangentRows<T> cotangents_;
  TableGradient<T> table_gradient_;
  ExpandedTable<T>* grad_table_ = nullptr;  // of the head whose turn it is
  GradientRows<T> grad_key_, grad_value_;
  StripWeights<T> weights_[kWeights];
  RowWeights<T> score_bar_rows_, grad_score_rows_, value_rows_;
  StripResults<T> grad_grad_output_, grad_query_;
  // What D lacks, less y; r in two parts, t without its last term; sums of Sb and dS.
  Vector<T> d_rest_[kStrip][kGroup], r_sum_[kStrip][kGroup], r_rest_[kStrip][kGroup], t_[kStrip][kGroup];
  Vector<T> score_bar_sum_[kStrip][kGroup], grad_score_sum_[kStrip][kGroup];
  bool strange_ = false;  // as BackwardRows, and gQ
  std::vector<Term<T>> terms_;
  QueryGatherer<T> gatherer_;
};

template <class T>
void neighborhood_double_backward(const Arguments& a, HeadRange heads) {
  run_neighborhood_gradients<T>(a, heads, kDoubleBackward, [&] { return NeighborhoodDoubleBackward<T>(a); });
}

}  // namespace natten_ext::NATTEN_EXT_ISA
