// Backward of neighborhood attention; the formulas are those of dense_backward.h, whole rows at hand.
//
// A job walks down its rows of queries. Each group of rows computes P and dS of its windows once, gathers dQ, and adds
// its share to the few rows of dK and dV that it attends, which are written out when the windows have passed them.
// At the edges of its band a job also computes the rows of its neighbors that attend its keys.
#pragma once

#include "neighborhood_gatherer.h"
#include "neighborhood_saved.h"

namespace natten_ext::NATTEN_EXT_ISA {

// Rows of a band's key gradients that the windows are passing over: in each plane of a ring of planes, where there are
// several all of the band's.
template <class T>
class GradientRows {
 public:
  void start(const ClassGeometry<T>& g, const NeighborhoodJob& job, int64_t channels, bool new_geometry) {
    const int64_t rows = g.kz == 1 ? g.ring_rows : job.rows.end - job.rows.start;
    if (new_geometry || ring.rows() != rows) ring.resize(g.kz, rows, channels, g);
    job_ = &job;
    queries_ = -1;
    new_plane_ = seen_ = done_ = job.planes.start;
  }
  // Makes the rows that a group attends ready to be added to.
  void open(const RowGroup& group) {
    if (group.z != queries_) {
      queries_ = group.z;
      new_plane_ = seen_;
      seen_ = std::max(seen_, std::min(group.planes.end, job_->planes.end));
      next_ = oldest_ = job_->rows.start;
    }
    const int64_t end = std::min(group.last(), job_->rows.end);
    for (int64_t z = new_plane_; z < seen_; ++z) {
      for (int64_t y = next_; y < end; ++y) ring.clear({z, y});
    }
    next_ = std::max(next_, end);
  }
  // Calls write(row) for the band's rows which no later query attends: those above `first` in planes before it.
  template <class Write>
  void close(Row first, const Write& write) {
    const int64_t planes = std::min(first.z, job_->planes.end), rows = std::min(first.y, job_->rows.end);
    for (int64_t z = done_; z < planes; ++z) {
      for (int64_t y = oldest_; y < rows; ++y) write(Row{z, y});
    }
    oldest_ = std::max(oldest_, rows);
    if (oldest_ == job_->rows.end) done_ = std::max(done_, planes);
  }

  RowRing<T> ring;

 private:
  const NeighborhoodJob* job_ = nullptr;
  int64_t queries_ = -1;                          // their plane
  int64_t new_plane_ = 0, seen_ = 0, done_ = 0;   // planes: first met by these queries, before any of them, written
  int64_t next_ = 0, oldest_ = 0;                 // rows: not met by these queries, not written
};

// Calls visit(group, next) for the rows of queries that attend any of the job's keys; `next` is the first row of keys that
// later ones of the plane attend, and its z the first plane that later planes do.
template <class T, class Visit>
void for_each_attending_group(const ClassGeometry<T>& g, const NeighborhoodJob& job, const Visit& visit) {
  const Range planes = g.axis_z.attending(job.planes), rows = g.axis_y.attending(job.rows);
  for_each_group(g, planes, rows, [&](const RowGroup& group) {
    const int64_t y = group.y + kGroup, z = group.z + 1;
    visit(group, Row{z < planes.end ? g.axis_z.keys(z).start : g.axis_z.length,
                     y < rows.end ? g.axis_y.keys(y).start : g.axis_y.length});
  });
}

// What the backward orders hold of a group of rows of queries beside the queries themselves.
template <class T>
class BackwardRows : public SavedRows<T> {
 public:
  static constexpr int L = kLanes<T>;
  using SavedRows<T>::log_sum;

  explicit BackwardRows(const Arguments& a) : a_(a) {}

  void resize(const ClassGeometry<T>& g, int64_t channels) {
    SavedRows<T>::resize(g);
    channels_ = channels;
    for (RowRing<T>* ring : {&grad_output, &output}) ring->resize(1, kGroup, channels, g);
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
      const Row row = group.row(r);
      rows.transposer.load(grad_output.row(row), grad_output.stride(), a_.grad_output, job, row, 1);
      rows.transposer.load(output.row(row), output.stride(), a_.output, job, row, 1, rows.value_origin());
      for (int64_t x = 0; x < g.padded; x += L) {
        store(d[r] + x, dot(grad_output.row(row) + x, output.row(row) + x, output.stride()));
      }
      if (a_.grad_lse) rows.load_lanes(grad_lse[r], a_.grad_lse, row, 0);
      for (int64_t i = 0; i < g.padded; ++i) strange = strange || !std::isfinite(log_sum[r][i]) || !std::isfinite(d[r][i]);
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

// The gradients of the tables of heads that share a key head, or of interleaved ones, over the jobs of a task.
template <class T>
class TableGradient {
 public:
  TableGradient(const Arguments& a) : expanded(a.grad_bias ? a.problem.shared() : 0), a_(a) {}
  // What is flushed is added to these, of heads from the first on.
  void start(const PartialTables<T>& target, int64_t first_head) { target_ = target, first_head_ = first_head; }
  // Must come before the geometry or the heads of jobs change, and last.
  void flush(const NeighborhoodRows<T>& rows) {
    if (!open_) return;
    const NeighborhoodJob& job = rows.job;
    for (size_t member = 0; member < expanded.size(); ++member) {
      T* targets[kLanes<T>];  // of lanes
      for (int lane = 0; lane < kLanes<T>; ++lane) {
        targets[lane] = target_.table((job.interleaved ? job.classes[lane].head : job.first().head + member) - first_head_);
      }
      const int64_t lanes = job.interleaved ? job.count : kLanes<T>;
      const auto add = [&](T value, int64_t lane, int64_t i) {
        if (lane < lanes) targets[lane][i] += value;
      };
      expanded[member].for_each(rows.geometry, a_.problem, add, [](T) {});
    }
    open_ = false;
  }
  void open(const ClassGeometry<T>& g) {
    if (open_) return;
    for (ExpandedTable<T>& table : expanded) {
      table.resize(g);
      table.clear();
    }
    open_ = true;
  }

  std::vector<ExpandedTable<T>> expanded;  // none where they are not wanted

 private:
  const Arguments& a_;
  PartialTables<T> target_;
  int64_t first_head_ = 0;
  bool open_ = false;
};

// Runs turn(member) with the job's head set to each of those that share its key head.
template <class T, class Turn>
void for_each_member(const Problem& p, NeighborhoodRows<T>& rows, const Turn& turn) {
  int64_t& head = rows.job.classes[0].head;
  for (int64_t member = 0; member < p.shared(); ++member, ++head) turn(member);
  head -= p.shared();
}

template <class T>
class NeighborhoodBackward {
 public:
  static constexpr int L = kLanes<T>;

  explicit NeighborhoodBackward(const Arguments& a)
      : a_(a), rows_(a, 0, true), backward_(a), table_gradient_(a) {
    grad_query_.resize(a.problem.head_dim);
  }

  // Partial gradients of the tables of heads from the first on, to which the jobs that follow add.
  void start(const PartialTables<T>& partial, int64_t first_head) { table_gradient_.start(partial, first_head); }
  void finish() { table_gradient_.flush(rows_); }

  void run(const NeighborhoodJob& new_job) {
    const ClassGeometry<T>& g = rows_.geometry;
    if (rows_.tables_differ(new_job)) table_gradient_.flush(rows_);
    const bool new_geometry = rows_.start(new_job);
    if (new_geometry) resize();
    table_gradient_.open(g);
    const NeighborhoodJob& job = rows_.job;
    grad_key_.start(g, job, rows_.query_channels, new_geometry);
    grad_value_.start(g, job, rows_.channels, new_geometry);
    for_each_attending_group(g, job, [&](const RowGroup& group, Row next) {
      rows_.load_keys(group, [](Row) {});
      grad_key_.open(group);
      grad_value_.open(group);
      for_each_member(a_.problem, rows_, [&](int64_t member) { run_group(group, member); });
      close(next);
    });
  }

 private:
  // Of one head: its gradients, and its share of those of the keys.
  void run_group(const RowGroup& group, int64_t member) {
    const ClassGeometry<T>& g = rows_.geometry;
    rows_.load_queries(group);
    backward_.load(rows_, group);
    grad_table_ = a_.grad_bias ? &table_gradient_.expanded[member] : nullptr;
    g.for_each_strip([&](int64_t begin, int64_t end) { strip(group, begin, end); });
    if (a_.grad_key) {
      gatherer_.run(g, group, grad_score_rows_, rows_.query, rows_.query_channels, grad_key_.ring, rows_.job,
                    backward_.strange);
    }
    if (a_.grad_value) {
      gatherer_.run(g, group, probability_rows_, backward_.grad_output, rows_.channels, grad_value_.ring, rows_.job,
                    backward_.strange);
    }
  }

  void resize() {
    const ClassGeometry<T>& g = rows_.geometry;
    backward_.resize(g, rows_.channels);
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
    if (!a_.grad_query || !rows_.job.owns_any(group.row(0), group.count)) return;
    gather_keys<T>(g, group, begin, end, scores_, rows_.key, rows_.channels, terms_, grad_query_, false);
    for (int64_t b = begin; b < end; ++b) {
      for (int r = 0; r < group.count; ++r) {
        const Row row = group.row(r);
        if (!rows_.job.template owns<L>(row, b)) continue;
        T* gradient = grad_query_.row(b - begin, r);
        if (a_.problem.l2) rows_.subtract_own(gradient, rows_.query.row(row) + b * L, row_sum_[b - begin][r]);
        else if (a_.grad_lse) rows_.add_origin(gradient, load(backward_.grad_lse[r] + b * L));
        rows_.transposer.unload(gradient, L, a_.grad_query, rows_.job, row, b, broadcast(T(a_.problem.dot_scale())));
      }
    }
  }

  // One block of queries: scores to P, and dP to dS.
  void score_gradients(const RowGroup& group, int r, int64_t b, int64_t slot) {
    const ClassGeometry<T>& g = rows_.geometry;
    const int64_t n = group.key_rows(r) * g.kx, x = b * L;
    const bool to_table = grad_table_ != nullptr && rows_.job.template owns<L>(group.row(r), b);
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
    for (int64_t z = group.planes.start, i = 0, key = 0; z < group.planes.end; ++z) {
      T* grad_table = to_table ? grad_table_->row(g.query_blocks[b].table, group, r, z) - i * L : nullptr;
      for (const int64_t end = key + group.rows(r); key < end; ++key) {
        for (int64_t kx = 0; kx < g.kx; ++kx, ++i) {
          const Vector<T> weight = load(weights + i * L), gradient = weight * (load(scores + i * L) - d_rest);
          row_sum += gradient;
          store(scores + i * L, gradient);
          const int64_t at = key * g.weights_stride + kx * g.padded;
          store(weight_row + at, weight);
          store(score_row + at, gradient);
          if (grad_table != nullptr) store(grad_table + i * L, load(grad_table + i * L) + gradient);
        }
      }
    }
    row_sum_[slot][r] = row_sum;
  }

  // Writes out the rows of dK and dV that the windows have passed.
  void close(Row first) {
    grad_key_.close(first, [&](Row row) {
      if (!a_.grad_key) return;
      T* gradient = grad_key_.ring.row(row);
      if (a_.problem.l2) rows_.subtract_keys(gradient, gradient + rows_.channels * grad_key_.ring.stride(), row, rows_.key);
      rows_.transposer.unload_row(gradient, grad_key_.ring.stride(), a_.grad_key, rows_.job, row, kLn2<T>);
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
  TableGradient<T> table_gradient_;
  ExpandedTable<T>* grad_table_ = nullptr;  // of the head whose turn it is
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
void run_neighborhood_gradients(const Arguments& a, HeadRange heads, const NeighborhoodOrder& order, const Make& make) {
  const Problem& p = a.problem;
  const int64_t key_heads = heads.count() / p.shared();
  const std::optional<InterleavedJobs> interleaved = interleaved_jobs<T>(p, heads, order);
  BandSizes sizes = band_sizes<T>(p, heads, order);
  // Jobs of several heads are long: where they would be few, their bands are narrower.
  if (p.shared() > 1 && key_heads * HeadJobs(p, heads.first, sizes).count() < 16) sizes.rows = 16;
  const HeadJobs jobs(p, heads.first, sizes);
  const int64_t count = interleaved ? interleaved->count() : jobs.count(), parts = std::min<int64_t>(16, count);
  const int64_t table_size = a.grad_bias ? p.table_size() : 0;
  Buffer<T> partial(heads.count() * parts * table_size);
  std::fill_n(partial.data(), heads.count() * parts * table_size, T(0));
  // Heads vary fastest: they share the pages of memory.
  const int64_t tasks_of_part = interleaved ? 1 : key_heads;
  const auto task = [&](auto& worker, int64_t number) {
    const int64_t head = heads.first + number % tasks_of_part * p.shared(), part = number / tasks_of_part;
    worker.start({partial + part * table_size, parts * table_size}, heads.first);
    for (int64_t job = part * count / parts; job < (part + 1) * count / parts; ++job) {
      worker.run(interleaved ? interleaved->job(job) : jobs.job(head, job));
    }
    worker.finish();
  };
  for_each_task(tasks_of_part * parts, make, task, neighborhood_cost<T>(p, heads, order.cost));
  if (a.grad_bias) reduce_tables<T>(partial, parts, a.grad_bias, heads, p);
}

template <class T>
void neighborhood_backward(const Arguments& a, HeadRange heads) {
  run_neighborhood_gradients<T>(a, heads, kBackward, [&] { return NeighborhoodBackward<T>(a); });
}

}  // namespace natten_ext::NATTEN_EXT_ISA
