// Backward of neighborhood attention; the formulas are those of dense_backward.h, whole rows at hand.
//
// A job walks down its rows of queries. Each group of rows computes P and dS of its windows once, gathers dQ, and adds
// its share to the few rows of dK and dV that it attends, which are written out when the windows have passed them.
// At the edges of its band a job also computes the rows of its neighbors that attend its keys.
#pragma once

#include "neighborhood_saved.h"

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

// What the backward orders hold of a group of rows of queries beside the queries themselves.
template <class T>
class BackwardRows : public SavedRows<T> {
 public:
  static constexpr int L = kLanes<T>;
  using SavedRows<T>::log_sum;

  explicit BackwardRows(const Arguments& a) : SavedRows<T>(a), a_(a) {}

  void resize(const ClassGeometry<T>& g, int64_t channels) {
    SavedRows<T>::resize(g);
    channels_ = channels;
    grad_output.resize(kGroup, channels, g);
    output.resize(kGroup, channels, g);
    for (int r = 0; r < kGroup; ++r) {
      d[r] = Buffer<T>(g.padded), grad_lse[r] = Buffer<T>(g.padded);
      std::fill_n(grad_lse[r].data(), g.padded, T(0));
    }
  }
  void load(NeighborhoodRows<T>& rows, const RowGroup& group) {
    const NeighborhoodJob& job = rows.job;
    const ClassGeometry<T>& g = rows.geometry;
    SavedRows<T>::load(rows, group);
    strange = false;
    for (int r = 0; r < group.count; ++r) {
      const int64_t y = group.y + r;
      rows.transposer.load(grad_output.row(y), grad_output.stride(), a_.grad_output, job, y, 1);
      rows.transposer.load(output.row(y), output.stride(), a_.output, job, y, 1, rows.value_origin());
      for (int64_t x = 0; x < g.padded; x += L) {
        store(d[r] + x, dot(grad_output.row(y) + x, output.row(y) + x, output.stride()));
      }
      for (int64_t x = 0; a_.grad_lse && x < g.width; ++x) {
        grad_lse[r][x] = static_cast<const T*>(a_.grad_lse.data)[job.offset(a_.grad_lse, y, x)];
      }
      for (int64_t x = 0; x < g.width; ++x) strange = strange || !std::isfinite(log_sum[r][x]) || !std::isfinite(d[r][x]);
    }
  }
  // Product over the channels of a vector of queries in a row of `grad_output` and another; see dot_lanes.
  Vector<T> dot(const T* a, const T* b, int64_t b_stride) const {
    Vector<T> sum{};
    for (int64_t c = 0; c < channels_; ++c) {
      sum += NATTEN_EXT_ISA::load(a + c * grad_output.stride()) * NATTEN_EXT_ISA::load(b + c * b_stride);
    }
    return sum;
  }

 private:
  const Arguments& a_;
  int64_t channels_ = 0;

 public:
  RowRing<T> grad_output, output;
  Buffer<T> d[kGroup], grad_lse[kGroup];  // D and y
  bool strange = false;  // a query or a gradient of an output may be NaN or infinite
};

// The gradient of one head's table, over the jobs of a task.
template <class T>
class TableGradient {
 public:
  TableGradient(const Arguments& a) : a_(a) {}
  // What is flushed is added to `target`, if there is one.
  void start(T* target) { target_ = target; }
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
      : a_(a), rows_(a, 0, true), backward_(a), table_gradient_(a) {
    grad_query_.resize(a.problem.head_dim);
  }

  // Partial gradient of the table of the jobs that follow, which is added to.
  void start(T* partial) { table_gradient_.start(a_.grad_bias ? partial : nullptr); }
  void finish() { table_gradient_.flush(rows_.geometry); }

  void run(const NeighborhoodJob& new_job) {
    const ClassGeometry<T>& g = rows_.geometry;
    if (rows_.differs(new_job)) table_gradient_.flush(g);
    if (rows_.start(new_job)) resize();
    table_gradient_.open(g);
    const NeighborhoodJob& job = rows_.job;
    const auto [begin, end] = attending_rows(g, job);
    grad_key_.start(job, g.start_y(begin));
    grad_value_.start(job, g.start_y(begin));
    for (int64_t y = begin; y < end; y += kGroup) {
      const RowGroup group(g, y, end);
      rows_.load_queries(group);
      backward_.load(rows_, group);
      rows_.load_keys(group, [](int64_t) {});
      grad_key_.open(group.last());
      grad_value_.open(group.last());
      const int64_t blocks = static_cast<int64_t>(g.query_blocks.size());
      for (int64_t b = 0; b < blocks; b += kStrip) strip(group, b, std::min(blocks, b + kStrip));
      if (a_.grad_key) {
        gatherer_.run(g, group, grad_score_rows_, rows_.query, rows_.query_channels, grad_key_.ring, job.begin, job.end,
                      backward_.strange);
      }
      if (a_.grad_value) {
        gatherer_.run(g, group, probability_rows_, backward_.grad_output, rows_.channels, grad_value_.ring, job.begin, job.end,
                      backward_.strange);
      }
      close(y + kGroup < end ? g.start_y(y + kGroup) : g.height);
    }
  }
 private:
  void resize() {
    const ClassGeometry<T>& g = rows_.geometry;
    backward_.resize(g, rows_.channels);
    grad_key_.ring.resize(g.ky + kGroup - 1, rows_.query_channels, g);
    grad_value_.ring.resize(g.ky + kGroup - 1, rows_.channels, g);
    for (StripWeights<T>* weights : {&weights_, &scores_}) weights->resize(g);
    for (RowWeights<T>* weights : {&probability_rows_, &grad_score_rows_}) weights->resize(g);
  }

  // Blocks [begin, end): P and dS of the windows, to the group's rows of weights; dQ and the table's gradient.
  void strip(const RowGroup& group, int64_t begin, int64_t end) {
    const ClassGeometry<T>& g = rows_.geometry;
    score_strip(g, group, begin, end, rows_.query, rows_.key, rows_.score_channels, weights_, false, rows_.table());
    score_strip(g, group, begin, end, backward_.grad_output, rows_.value, rows_.channels, scores_, false);
    for (int64_t b = begin; b < end; ++b) {
      for (int r = 0; r < group.count; ++r) score_gradients(group, r, b, b - begin);
    }
    if (!a_.grad_query || !rows_.job.owns_any(group.y, group.count)) return;
    gather_keys<T>(g, group, begin, end, scores_, rows_.key, rows_.channels, terms_, grad_query_, false);
    for (int64_t b = begin; b < end; ++b) {
      for (int r = 0; r < group.count; ++r) {
        const int64_t y = group.y + r;
        if (!rows_.job.owns(y)) continue;
        T* gradient = grad_query_.row(b - begin, r);
        if (a_.problem.l2) rows_.subtract_own(gradient, rows_.query.row(y) + b * L, row_sum_[b - begin][r]);
        else if (a_.grad_lse) rows_.add_origin(gradient, load(backward_.grad_lse[r] + b * L));
        rows_.transposer.unload(gradient, L, a_.grad_query, rows_.job, y, b * L, T(a_.problem.dot_scale()));
      }
    }
  }

  // One block of queries: scores to P, and dP to dS.
  void score_gradients(const RowGroup& group, int r, int64_t b, int64_t slot) {
    const ClassGeometry<T>& g = rows_.geometry;
    const int64_t n = g.ky * g.kx;
    const int64_t y = group.y + r, x = b * L, distance = group.start[r] - y, which = g.query_blocks[b].table;
    T* grad_table = a_.grad_bias && rows_.job.owns(y) ? table_gradient_.expanded.row(which, distance) : nullptr;
    T* const weights = weights_.block(r, slot);
    T* const scores = scores_.block(r, slot);
    const Vector<T> base = load(backward_.base[r] + x), log_sum = load(backward_.log_sum[r] + x);
    const Vector<T> d = load(backward_.d[r] + x);
    Vector<T> d_rest{}, row_sum{};
    for (int64_t i = 0; i < n; ++i) {
      const Vector<T> weight = exp2(load(weights + i * L) - base - log_sum), centred = load(scores + i * L) - d;
      d_rest += weight * centred;
      store(weights + i * L, weight);
      store(scores + i * L, centred);
    }
    d_rest -= load(backward_.grad_lse[r] + x);
    T* weight_row = probability_rows_.rows[r] + x;
    T* score_row = grad_score_rows_.rows[r] + x;
    for (int64_t i = 0, ky = 0; ky < g.ky; ++ky) {
      for (int64_t kx = 0; kx < g.kx; ++kx, ++i) {
        const Vector<T> weight = load(weights + i * L), gradient = weight * (load(scores + i * L) - d_rest);
        row_sum += gradient;
        store(scores + i * L, gradient);
        const int64_t at = ky * g.weights_stride + kx * g.padded;
        store(weight_row + at, weight);
        store(score_row + at, gradient);
        if (grad_table != nullptr) store(grad_table + i * L, load(grad_table + i * L) + gradient);
      }
    }
    row_sum_[slot][r] = row_sum;
  }

  // Writes out the rows of dK and dV that the windows have passed.
  void close(int64_t first) {
    grad_key_.close(first, [&](int64_t row) {
      if (!a_.grad_key) return;
      T* gradient = grad_key_.ring.row(row);
      if (a_.problem.l2) rows_.subtract_keys(gradient, gradient + rows_.channels * grad_key_.ring.stride(), row, rows_.key);
      rows_.transposer.unload_row(gradient, grad_key_.ring.stride(), a_.grad_key, rows_.job, row, kLn2<T>);
    });
    grad_value_.close(first, [&](int64_t row) {
      if (!a_.grad_value) return;
      const RowRing<T>& ring = grad_value_.ring;
      rows_.transposer.unload_row(ring.row(row), ring.stride(), a_.grad_value, rows_.job, row, 1);
    });
  }

  const Arguments& a_;
  NeighborhoodRows<T> rows_;
  BackwardRows<T> backward_;
  TableGradient<T> table_gradient_;
  GradientRows<T> grad_key_, grad_value_;
  StripWeights<T> weights_, scores_;        // P and dS
  RowWeights<T> probability_rows_, grad_score_rows_;  // the same
  StripResults<T> grad_query_;
  Vector<T> row_sum_[kStrip][kGroup];  // of dS
  std::vector<Term<T>> terms_;
  QueryGatherer<T> gatherer_;
};

// Runs a gradient kernel over the jobs of heads with one window in chunks, each with a partial table of its own.
template <class T, class Make>
void run_neighborhood_gradients(const Arguments& a, HeadRange heads, const Make& make) {
  const Problem& p = a.problem;
  const HeadJobs jobs(p, heads.first, 64);
  const int64_t parts = std::min<int64_t>(16, jobs.count());
  const int64_t table_size = a.grad_bias ? p.table_height() * p.table_width() : 0;
  Buffer<T> partial(heads.count() * parts * table_size);
  std::fill_n(partial.data(), heads.count() * parts * table_size, T(0));
  for_each_task(heads.count() * parts, make, [&](auto& worker, int64_t task) {
    // Heads vary fastest: they share the pages of memory.
    const int64_t head = task % heads.count(), part = task / heads.count();
    worker.start(partial + (head * parts + part) * table_size);
    for (int64_t job = part * jobs.count() / parts; job < (part + 1) * jobs.count() / parts; ++job) {
      worker.run(jobs.job(heads.first + head, job));
    }
    worker.finish();
  });
  if (a.grad_bias) reduce_tables<T>(partial, parts, a.grad_bias, heads, p.table_height(), p.table_width());
}

template <class T>
void neighborhood_backward(const Arguments& a, HeadRange heads) {
  run_neighborhood_gradients<T>(a, heads, [&] { return NeighborhoodBackward<T>(a); });
}

}  // namespace natten_ext::NATTEN_EXT_ISA
