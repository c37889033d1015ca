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
      : a_(a), rows_(a, a.problem.l2 ? 1 : 0), backward_(a), table_gradient(a) {
    for (int r = 0; r < 2; ++r) {
      for (Buffer<T>* buffer : {&pv_[r], &pxv_[r], &grad_query_[r]}) *buffer = Buffer<T>(a.problem.head_dim * L);
      // Absent products count as zero.
      std::fill_n(pv_[r].data(), a.problem.head_dim * L, T(0));
    }
  }

  // As NeighborhoodBackward::run.
  void run(const NeighborhoodJob& new_job) {
    const ClassGeometry<T>& g = rows_.geometry;
    if (rows_.differs(new_job)) table_gradient.flush(g);
    if (rows_.start(new_job)) resize();
    table_gradient.open(g);
    const NeighborhoodJob& job = rows_.job;
    const auto [begin, end] = attending_rows(g, job);
    grad_key_.start(job, g.start_y(begin));
    grad_value_.start(job, g.start_y(begin));
    for (int64_t y = begin; y < end; y += 2) {
      const RowPair pair(g, y, end);
      load(pair);
      grad_key_.open(pair.last());
      grad_value_.open(pair.last());
      for (int64_t x = 0; x < g.width; x += L) block(pair, x);
      gather(pair);
      close(y + 2 < end ? g.start_y(y + 2) : g.height);
    }
  }
  void finish() { table_gradient.flush(rows_.geometry); }

 private:
  // What one window position passes from the scores to the gradients.
  enum Weight { kProbability, kGradScore, kX, kScoreBar, kValueWeight, kWeights };

  void resize() {
    const ClassGeometry<T>& g = rows_.geometry;
    backward_.resize(g, rows_.channels);
    cot_query_.resize(2, rows_.query_channels, g);
    cot_key_.resize(g.ky + 1, rows_.score_channels, g);
    cot_value_.resize(g.ky + 1, rows_.channels, g);
    grad_key_.ring.resize(g.ky + 1, rows_.query_channels, g);
    grad_value_.ring.resize(g.ky + 1, rows_.channels, g);
    if (a_.cot_bias) cot_table_.fill(g, a_.problem, a_.cot_bias, rows_.job.head, 1);
    for (int r = 0; r < 2; ++r) {
      for (Buffer<T>& buffer : weights_[r]) {
        buffer = Buffer<T>(g.ky * g.kx * L);
        std::fill_n(buffer.data(), g.ky * g.kx * L, T(0));
      }
      for (Buffer<T>* row : {&score_bar_rows_[r], &score_rows_[r], &value_rows_[r]}) {
        *row = Buffer<T>(g.ky * g.weights_stride);
        std::fill_n(row->data(), g.ky * g.weights_stride, T(0));
      }
    }
  }

  void load(const RowPair& pair) {
    const NeighborhoodJob& job = rows_.job;
    const Problem& p = a_.problem;
    rows_.load_queries(pair);
    backward_.load(rows_, pair);
    for (int64_t y = pair.y; a_.cot_query && y < pair.y + pair.count; ++y) {
      rows_.transposer.load(cot_query_.row(y), cot_query_.stride(), a_.cot_query, job, y, rows_.query_scale);
      if (p.l2) std::fill_n(cot_query_.row(y) + (rows_.channels + 1) * cot_query_.stride(), rows_.geometry.width, T(1));
    }
    rows_.load_keys(pair, [&](int64_t row) {
      if (a_.cot_key) {
        rows_.transposer.load(cot_key_.row(row), cot_key_.stride(), a_.cot_key, job, row, 1);
        if (p.l2) rows_.key_products(cot_key_.row(row), rows_.key.row(row), cot_key_.row(row), -rows_.query_scale);
      }
      if (a_.cot_value) rows_.transposer.load(cot_value_.row(row), cot_value_.stride(), a_.cot_value, job, row, 1);
    });
  }

  void block(const RowPair& pair, int64_t x) {
    const ClassGeometry<T>& g = rows_.geometry;
    const QueryBlock<T>& queries = g.query_blocks[x / L];
    const auto weights = [&](Weight which) { return std::array<T*, 2>{weights_[0][which], weights_[1][which]}; };
    const auto product = [&](const RowRing<T>& query, const RowRing<T>& key, int64_t channels, Weight to, bool add) {
      score_block(g, pair, queries, x, query, key, channels, weights(to).data(), add);
    };
    product(rows_.query, rows_.key, rows_.score_channels, kProbability, false);
    product(backward_.grad_output, rows_.value, rows_.channels, kGradScore, false);
    if (a_.cot_query) product(cot_query_, rows_.key, rows_.channels, kX, false);
    if (a_.cot_key) product(rows_.query, cot_key_, rows_.score_channels, kX, static_cast<bool>(a_.cot_query));
    if (a_.cot_value) product(backward_.grad_output, cot_value_, rows_.channels, kScoreBar, false);

    Vector<T> r_sum[2], e_sum[2];
    for (int r = 0; r < pair.count; ++r) row_sums(pair, r, queries, x, r_sum[r], e_sum[r]);
    const auto gather = [&](Weight weight, const RowRing<T>& value, Buffer<T>* out, bool add) {
      T* const target[2] = {out[0], out[1]};
      gather_keys<T>(g, pair, queries, weights(weight).data(), value, rows_.channels, terms_, target, add);
    };
    if (a_.cot_value) gather(kProbability, cot_value_, pv_, false);
    if (a_.grad_grad_output) {
      gather(kValueWeight, rows_.value, pxv_, false);  // holds P X for the time being
      for (int r = 0; r < pair.count; ++r) store_grad_output(pair, r, x, r_sum[r]);
    }
    for (int r = 0; r < pair.count; ++r) second_pass(pair, r, queries, x, r_sum[r], e_sum[r]);
    if (!a_.grad_query || !any_own(pair)) return;
    gather(kScoreBar, rows_.key, grad_query_, false);
    if (a_.cot_key) gather(kGradScore, cot_key_, grad_query_, true);
    for (int r = 0; r < pair.count; ++r) {
      if (!own(pair.y + r)) continue;
      rows_.transposer.unload(grad_query_[r], L, a_.grad_query, rows_.job, pair.y + r, x, T(a_.problem.dot_scale()));
    }
  }

  bool own(int64_t y) const { return y >= rows_.job.begin && y < rows_.job.end; }
  bool any_own(const RowPair& pair) const { return own(pair.y) || (pair.count == 2 && own(pair.y + 1)); }

  // P, X and P X, and the sums r and e.
  void row_sums(const RowPair& pair, int r, const QueryBlock<T>& queries, int64_t x, Vector<T>& r_sum, Vector<T>& e_sum) {
    const int64_t n = rows_.geometry.ky * rows_.geometry.kx, distance = pair.start[r] - (pair.y + r);
    const T* table = a_.bias ? rows_.table.row(queries.table, distance) : nullptr;
    const T* cot_table = a_.cot_bias ? cot_table_.row(queries.table, distance) : nullptr;
    const bool products = a_.cot_query || a_.cot_key;
    Buffer<T>* weights = weights_[r];
    const Vector<T> lse = NATTEN_EXT_ISA::load(backward_.lse2[r] + x);
    r_sum = e_sum = Vector<T>{};
    for (int64_t i = 0; i < n; ++i) {
      Vector<T> score = NATTEN_EXT_ISA::load(weights[kProbability] + i * L) - lse;
      if (table != nullptr) score += NATTEN_EXT_ISA::load(table + i * L);
      const Vector<T> probability = exp2(score);
      Vector<T> value{};
      if (products) value = NATTEN_EXT_ISA::load(weights[kX] + i * L) * kLn2<T>;  // queries carry log2(e)
      if (cot_table != nullptr) value += NATTEN_EXT_ISA::load(cot_table + i * L);
      const Vector<T> weighted = probability * value;
      r_sum += weighted;
      e_sum += weighted * NATTEN_EXT_ISA::load(weights[kGradScore] + i * L);
      store(weights[kProbability] + i * L, probability);
      store(weights[kX] + i * L, value);
      store(weights[kValueWeight] + i * L, weighted);
    }
  }

  // dO_bar = u - r O + w
  void store_grad_output(const RowPair& pair, int r, int64_t x, Vector<T> r_sum) {
    if (!own(pair.y + r)) return;
    const RowRing<T>& output = backward_.output;
    for (int64_t c = 0; c < rows_.channels; ++c) {
      const Vector<T> o = NATTEN_EXT_ISA::load(output.row(pair.y + r) + c * output.stride() + x);
      T* at = pxv_[r] + c * L;
      store(at, NATTEN_EXT_ISA::load(at) - r_sum * o + NATTEN_EXT_ISA::load(pv_[r] + c * L));
    }
    rows_.transposer.unload(pxv_[r], L, a_.grad_grad_output, rows_.job, pair.y + r, x, 1);
  }

  // Sb, dS and P (X - r), also to the pair's rows of weights; the table's gradient.
  void second_pass(const RowPair& pair, int r, const QueryBlock<T>& queries, int64_t x, Vector<T> r_sum, Vector<T> e_sum) {
    const ClassGeometry<T>& g = rows_.geometry;
    const int64_t y = pair.y + r;
    Buffer<T>* weights = weights_[r];
    const Vector<T> delta = NATTEN_EXT_ISA::load(backward_.delta[r] + x);
    Vector<T> t = e_sum - 2 * delta * r_sum;
    if (a_.cot_value) {
      const RowRing<T>& grad_output = backward_.grad_output;
      for (int64_t c = 0; c < rows_.channels; ++c) {
        t += NATTEN_EXT_ISA::load(grad_output.row(y) + c * grad_output.stride() + x) * NATTEN_EXT_ISA::load(pv_[r] + c * L);
      }
    }
    T* table = own(y) && a_.grad_bias ? table_gradient.expanded.row(queries.table, pair.start[r] - y) : nullptr;
    for (int64_t i = 0; i < g.ky * g.kx; ++i) {
      const Vector<T> probability = NATTEN_EXT_ISA::load(weights[kProbability] + i * L);
      const Vector<T> dp = NATTEN_EXT_ISA::load(weights[kGradScore] + i * L);
      const Vector<T> value = NATTEN_EXT_ISA::load(weights[kX] + i * L);
      Vector<T> inner = value * (dp - delta) - r_sum * dp - t;
      if (a_.cot_value) inner += NATTEN_EXT_ISA::load(weights[kScoreBar] + i * L);  // G so far
      const Vector<T> score_bar = probability * inner, grad_score = probability * (dp - delta);
      store(weights[kScoreBar] + i * L, score_bar);
      store(weights[kGradScore] + i * L, grad_score);
      const int64_t at = i / g.kx * g.weights_stride + i % g.kx * g.padded + x;
      store(score_bar_rows_[r] + at, score_bar);
      store(score_rows_[r] + at, grad_score);
      store(value_rows_[r] + at, probability * (value - r_sum));
      if (table != nullptr) store(table + i * L, NATTEN_EXT_ISA::load(table + i * L) + score_bar);
    }
  }

  // The pair's share of k_bar and v_bar.
  void gather(const RowPair& pair) {
    const ClassGeometry<T>& g = rows_.geometry;
    const auto run = [&](Buffer<T>* rows, const RowRing<T>& query, int64_t channels, const RowRing<T>& gradient) {
      const T* const weight[2] = {rows[0], rows[1]};
      gatherer_.run(g, pair, weight, query, channels, gradient, rows_.job.begin, rows_.job.end);
    };
    if (a_.grad_key) {
      run(score_bar_rows_, rows_.query, rows_.query_channels, grad_key_.ring);
      if (a_.cot_query) run(score_rows_, cot_query_, rows_.query_channels, grad_key_.ring);
      // colsum(dS) is wanted for the l2 term of gK even without gQ.
      else if (a_.cot_key && a_.problem.l2) add_column_sums(pair);
    }
    if (a_.grad_value) run(value_rows_, backward_.grad_output, rows_.channels, grad_value_.ring);
  }

  void add_column_sums(const RowPair& pair) {
    for (int64_t y = pair.y; y < pair.y + pair.count; ++y) {
      cot_query_.clear(y);
      std::fill_n(cot_query_.row(y) + (rows_.channels + 1) * cot_query_.stride(), rows_.geometry.width, T(1));
    }
    const T* const weight[2] = {score_rows_[0], score_rows_[1]};
    gatherer_.run(rows_.geometry, pair, weight, cot_query_, rows_.query_channels, grad_key_.ring, rows_.job.begin,
                  rows_.job.end);
  }

  // Writes out the rows of k_bar and v_bar that the windows have passed.
  void close(int64_t first) {
    const ClassGeometry<T>& g = rows_.geometry;
    const int64_t stride = grad_key_.ring.stride();
    grad_key_.close(first, [&](int64_t row) {
      if (!a_.grad_key) return;
      T* gradient = grad_key_.ring.row(row);
      if (a_.problem.l2) {
        rows_.subtract_keys(gradient, gradient + rows_.channels * stride, row, rows_.key);
        if (a_.cot_key) rows_.subtract_keys(gradient, gradient + (rows_.channels + 1) * stride, row, cot_key_);
      }
      for (int64_t x = 0; x < g.width; x += L) {
        rows_.transposer.unload(gradient + x, stride, a_.grad_key, rows_.job, row, x, kLn2<T>);
      }
    });
    grad_value_.close(first, [&](int64_t row) {
      if (!a_.grad_value) return;
      for (int64_t x = 0; x < g.width; x += L) {
        rows_.transposer.unload(grad_value_.ring.row(row) + x, grad_value_.ring.stride(), a_.grad_value, rows_.job, row, x, 1);
      }
    });
  }

  const Arguments& a_;
  NeighborhoodRows<T> rows_;
  BackwardRows<T> backward_;

 public:
  TableGradient<T> table_gradient;

 private:
  ExpandedTable<T> cot_table_;
  RowRing<T> cot_query_, cot_key_, cot_value_;  // gQ times a log2(e)
  GradientRows<T> grad_key_, grad_value_;
  Buffer<T> weights_[2][kWeights];                                   // one block, [ky * kx][lanes]
  Buffer<T> score_bar_rows_[2], score_rows_[2], value_rows_[2];      // all blocks, [ky][weights_stride]
  Buffer<T> pv_[2], pxv_[2], grad_query_[2];                         // w, u, q_bar: [channel][lanes]
  std::vector<Term<T>> terms_;
  QueryGatherer<T> gatherer_;
};

template <class T>
void neighborhood_double_backward(const Arguments& a) {
  run_neighborhood_gradients<T>(a, [&] { return NeighborhoodDoubleBackward<T>(a); });
}

}  // namespace natten_ext::NATTEN_EXT_ISA
