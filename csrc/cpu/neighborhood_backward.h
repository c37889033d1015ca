// Backward of neighborhood attention; the formulas are those of dense_backward.h.
//
// A job walks down its rows of queries. Each pair of rows computes P and dS of its windows once, gathers dQ, and adds
// its share to the few rows of dK and dV that it attends, which are written out when the windows have passed them.
// At the edges of its band a job also computes the pairs of its neighbors that attend its keys.
#pragma once

#include "neighborhood_forward.h"

namespace natten_ext::NATTEN_EXT_ISA {

// Rows of a band's key gradients that the windows are passing over.
template <class T>
class GradientRows {
 public:
  void start(const NeighborhoodJob& job, int64_t first) {
    job_ = &job;
    next_ = first;
    oldest_ = first;
  }
  // Makes rows up to `last` ready to be added to.
  void open(int64_t last) {
    for (; next_ < last; ++next_) ring.clear(next_);
  }
  // Calls write(row) for the band's rows before `first`, which no later query attends.
  template <class Write>
  void close(int64_t first, const Write& write) {
    for (; oldest_ < std::min(first, next_); ++oldest_) {
      if (oldest_ >= job_->begin && oldest_ < job_->end) write(oldest_);
    }
  }

  RowRing<T> ring;

 private:
  const NeighborhoodJob* job_ = nullptr;
  int64_t next_ = 0, oldest_ = 0;
};

// Rows of queries that attend any row of keys of the job's band.
template <class T>
std::pair<int64_t, int64_t> attending_rows(const ClassGeometry<T>& g, const NeighborhoodJob& job) {
  int64_t begin = job.begin, end = job.end;
  while (begin > 0 && g.start_y(begin - 1) + g.ky > job.begin) --begin;
  while (end < g.height && g.start_y(end) < job.end) ++end;
  return {begin, end};
}

// What the backward orders hold of a pair of rows of queries beside the queries themselves.
template <class T>
class BackwardRows {
 public:
  static constexpr int L = kLanes<T>;

  explicit BackwardRows(const Arguments& a) : a_(a) {}

  void resize(const ClassGeometry<T>& g, int64_t channels) {
    channels_ = channels;
    grad_output.resize(2, channels, g);
    output.resize(2, channels, g);
    for (int r = 0; r < 2; ++r) {
      lse2[r] = Buffer<T>(g.padded);
      delta[r] = Buffer<T>(g.padded);
    }
  }
  void load(const NeighborhoodRows<T>& rows, const RowPair& pair) {
    const NeighborhoodJob& job = rows.job;
    const ClassGeometry<T>& g = rows.geometry;
    for (int r = 0; r < pair.count; ++r) {
      const int64_t y = pair.y + r;
      rows.transposer.load(grad_output.row(y), grad_output.stride(), a_.grad_output, job, y, 1);
      rows.transposer.load(output.row(y), output.stride(), a_.output, job, y, 1);
      const T* lse = static_cast<const T*>(a_.lse) + job.lse_offset(a_.problem, y);
      for (int64_t x = 0; x < g.padded; ++x) {
        // Lanes without a query: their P vanishes.
        lse2[r][x] = x < g.width ? lse[x * job.window.dilation_x] * kLog2E<T> : T(1e30);
      }
      for (int64_t x = 0; x < g.padded; x += L) store(delta[r] + x, dot(grad_output.row(y) + x, output.row(y) + x));
    }
  }
  // Product over the channels of one vector of queries.
  Vector<T> dot(const T* a, const T* b) const {
    Vector<T> sum{};
    for (int64_t c = 0; c < channels_; ++c) {
      sum += NATTEN_EXT_ISA::load(a + c * output.stride()) * NATTEN_EXT_ISA::load(b + c * output.stride());
    }
    return sum;
  }

 private:
  const Arguments& a_;
  int64_t channels_ = 0;

 public:
  RowRing<T> grad_output, output;
  Buffer<T> lse2[2], delta[2];  // log2 sum exp2; D
};

// The gradient of one head's table, over the jobs of a task.
template <class T>
class TableGradient {
 public:
  TableGradient(const Arguments& a) : a_(a) {}
  void start(T* target) {
    target_ = target;
    if (target != nullptr) std::fill_n(target, a_.problem.table_height() * a_.problem.table_width(), T(0));
  }
  // Must come before the geometry changes, and last.
  void flush(const ClassGeometry<T>& g) {
    if (target_ == nullptr || !open_) return;
    expanded.for_each(g, a_.problem, [&](T value, int64_t y, int64_t x) { target_[y * a_.problem.table_width() + x] += value; });
    open_ = false;
  }
  void open(const ClassGeometry<T>& g) {
    if (target_ == nullptr || open_) return;
    expanded.resize(g);
    expanded.clear();
    open_ = true;
  }

  ExpandedTable<T> expanded;

 private:
  const Arguments& a_;
  T* target_ = nullptr;
  bool open_ = false;
};

template <class T>
class NeighborhoodBackward {
 public:
  static constexpr int L = kLanes<T>;

  explicit NeighborhoodBackward(const Arguments& a)
      : a_(a),
        rows_(a, 0),
        backward_(a),
        table_gradient(a),
        grad_query_{Buffer<T>(a.problem.head_dim * L), Buffer<T>(a.problem.head_dim * L)} {}

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
      rows_.load_queries(pair);
      backward_.load(rows_, pair);
      rows_.load_keys(pair, [](int64_t) {});
      grad_key_.open(pair.last());
      grad_value_.open(pair.last());
      for (int64_t x = 0; x < g.width; x += L) block(pair, x);
      T* const score_rows[2] = {score_rows_[0], score_rows_[1]};
      T* const weight_rows[2] = {weight_rows_[0], weight_rows_[1]};
      if (a_.grad_key) {
        gatherer_.run(g, pair, score_rows, rows_.query, rows_.query_channels, grad_key_.ring, job.begin, job.end);
      }
      if (a_.grad_value) {
        gatherer_.run(g, pair, weight_rows, backward_.grad_output, rows_.channels, grad_value_.ring, job.begin, job.end);
      }
      close(y + 2 < end ? g.start_y(y + 2) : g.height);
    }
  }
  void finish() { table_gradient.flush(rows_.geometry); }

 private:
  void resize() {
    const ClassGeometry<T>& g = rows_.geometry;
    backward_.resize(g, rows_.channels);
    grad_key_.ring.resize(g.ky + 1, rows_.query_channels, g);
    grad_value_.ring.resize(g.ky + 1, rows_.channels, g);
    for (int r = 0; r < 2; ++r) {
      weights_[r] = Buffer<T>(g.ky * g.kx * L);
      scores_[r] = Buffer<T>(g.ky * g.kx * L);
      for (Buffer<T>* row : {&weight_rows_[r], &score_rows_[r]}) {
        *row = Buffer<T>(g.ky * g.weights_stride);
        std::fill(row->data(), row->data() + g.ky * g.weights_stride, T(0));
      }
    }
  }

  // One block of queries: P and dS of the windows, to the pair's rows of weights; dQ and the table's gradient.
  void block(const RowPair& pair, int64_t x) {
    const ClassGeometry<T>& g = rows_.geometry;
    const NeighborhoodJob& job = rows_.job;
    const QueryBlock<T>& queries = g.query_blocks[x / L];
    T* const weights[2] = {weights_[0], weights_[1]};
    T* const scores[2] = {scores_[0], scores_[1]};
    score_block(g, pair, queries, x, rows_.query, rows_.key, rows_.score_channels, weights, false);
    score_block(g, pair, queries, x, backward_.grad_output, rows_.value, rows_.channels, scores, false);
    for (int r = 0; r < pair.count; ++r) {
      const int64_t y = pair.y + r, distance = pair.start[r] - y;
      const bool own = y >= job.begin && y < job.end;
      const T* table = a_.bias ? rows_.table.row(queries.table, distance) : nullptr;
      T* table_gradient_rows =
          own && a_.grad_bias ? table_gradient.expanded.row(queries.table, distance) : nullptr;
      const Vector<T> lse = load(backward_.lse2[r] + x), delta = load(backward_.delta[r] + x);
      for (int64_t i = 0; i < g.ky * g.kx; ++i) {
        Vector<T> score = load(weights[r] + i * L) - lse;
        if (table != nullptr) score += load(table + i * L);
        const Vector<T> weight = exp2(score);
        const Vector<T> gradient = weight * (load(scores[r] + i * L) - delta);
        store(scores[r] + i * L, gradient);
        const int64_t at = i / g.kx * g.weights_stride + i % g.kx * g.padded + x;
        store(weight_rows_[r] + at, weight);
        store(score_rows_[r] + at, gradient);
        if (table_gradient_rows == nullptr) continue;
        T* target = table_gradient_rows + i * L;
        store(target, load(target) + gradient);
      }
    }
    const bool any_own = pair.y < job.end && pair.y + pair.count > job.begin;
    if (!a_.grad_query || !any_own) return;
    T* const grad_query[2] = {grad_query_[0], grad_query_[1]};
    gather_keys<T>(g, pair, queries, scores, rows_.key, rows_.channels, terms_, grad_query, false);
    for (int r = 0; r < pair.count; ++r) {
      const int64_t y = pair.y + r;
      if (y < job.begin || y >= job.end) continue;
      rows_.transposer.unload(grad_query[r], L, a_.grad_query, job, y, x, T(a_.problem.dot_scale()));
    }
  }

  // Writes out the rows of dK and dV that the windows have passed.
  void close(int64_t first) {
    const ClassGeometry<T>& g = rows_.geometry;
    grad_key_.close(first, [&](int64_t row) {
      if (!a_.grad_key) return;
      T* gradient = grad_key_.ring.row(row);
      if (a_.problem.l2) rows_.subtract_keys(gradient, gradient + rows_.channels * grad_key_.ring.stride(), row, rows_.key);
      for (int64_t x = 0; x < g.width; x += L) {
        rows_.transposer.unload(gradient + x, grad_key_.ring.stride(), a_.grad_key, rows_.job, row, x, kLn2<T>);
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
  GradientRows<T> grad_key_, grad_value_;
  Buffer<T> weights_[2], scores_[2];          // P and dS of one block, [ky * kx][lanes]
  Buffer<T> weight_rows_[2], score_rows_[2];  // the same of all blocks, [ky][weights_stride]
  Buffer<T> grad_query_[2];
  std::vector<Term<T>> terms_;
  QueryGatherer<T> gatherer_;
};

// Runs a gradient kernel over all jobs in chunks, each with a partial table of its own.
template <class T, class Make>
void run_neighborhood_gradients(const Arguments& a, const Make& make) {
  const Problem& p = a.problem;
  constexpr int64_t kBandRows = 64, kChunksPerHead = 64;
  const int64_t table_size = p.table_height() * p.table_width();
  int64_t parts = 1;
  for (int64_t head = 0; head < p.heads; ++head) {
    parts = std::max(parts, std::min(kChunksPerHead, HeadJobs(p, head, kBandRows).count()));
  }
  Buffer<T> partial(a.grad_bias ? p.heads * parts * table_size : 0);
  for_each_task(p.heads * parts, make, [&](auto& worker, int64_t task) {
    const int64_t head = task / parts, part = task % parts;
    const HeadJobs jobs(p, head, kBandRows);
    worker.table_gradient.start(a.grad_bias ? partial + task * table_size : nullptr);
    for (int64_t job = part * jobs.count() / parts; job < (part + 1) * jobs.count() / parts; ++job) {
      worker.run(jobs.job(job));
    }
    worker.finish();
  });
  if (a.grad_bias) {
    reduce_tables<T>(partial, parts, table_size, a.grad_bias, p.heads, p.table_height(), p.table_width(), false);
  }
}

template <class T>
void neighborhood_backward(const Arguments& a) {
  run_neighborhood_gradients<T>(a, [&] { return NeighborhoodBackward<T>(a); });
}

}  // namespace natten_ext::NATTEN_EXT_ISA
