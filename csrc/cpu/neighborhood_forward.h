// Forward of neighborhood attention: a plain softmax over each window, one query per lane.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "neighborhood.h"

namespace natten_ext::NATTEN_EXT_ISA {

// What all three orders hold of the queries and keys of a job, row by row.
//
// For l2 there is one more channel: 1 for queries and -s|k|^2 for keys, so that it joins the product q.k.
template <class T>
class NeighborhoodRows {
 public:
  NeighborhoodRows(const Arguments& a, int64_t extra_query_channels)
      : a_(a),
        transposer(a.problem.head_dim),
        channels(a.problem.head_dim),
        score_channels(channels + (a.problem.l2 ? 1 : 0)),
        query_channels(score_channels + extra_query_channels),
        query_scale(T(a.problem.dot_scale()) * kLog2E<T>) {}

  // Whether a job has another geometry or head than the last one.
  bool differs(const NeighborhoodJob& other) const {
    return geometry.height != other.class_height || geometry.width != other.class_width || job.head != other.head;
  }
  // Sets the job; returns whether it differs.
  bool start(const NeighborhoodJob& new_job) {
    const bool changed = differs(new_job);
    job = new_job;
    if (changed) {
      geometry.prepare(job.class_height, job.class_width, job.window.kernel_y, job.window.kernel_x);
      query.resize(kGroup, query_channels, geometry);
      key.resize(geometry.ky + kGroup - 1, score_channels, geometry);
      value.resize(geometry.ky + kGroup - 1, channels, geometry);
      if (a_.bias) table.fill(geometry, a_.problem, a_.bias, job.head, kLog2E<T>);
    }
    next_key_ = -1;
    return changed;
  }

  void load_queries(const RowGroup& group) {
    for (int64_t y = group.y; y < group.y + group.count; ++y) {
      transposer.load(query.row(y), query.stride(), a_.query, job, y, query_scale);
      if (a_.problem.l2) std::fill_n(query.row(y) + channels * query.stride(), geometry.width, T(1));
    }
  }

  // Brings in the rows of keys up to those of the group; visit(row) may load more of each new row.
  template <class Visit>
  void load_keys(const RowGroup& group, const Visit& visit) {
    for (int64_t row = std::max(next_key_, group.first()); row < group.last(); ++row) {
      transposer.load(key.row(row), key.stride(), a_.key, job, row, 1);
      transposer.load(value.row(row), value.stride(), a_.value, job, row, 1);
      if (a_.problem.l2) key_products(key.row(row), key.row(row), key.row(row), -a_.problem.scale * kLog2E<double>);
      visit(row);
    }
    next_key_ = std::max(next_key_, group.last());
  }

  // The extra channel of `target`: factor times the product of two rows, per key.
  void key_products(T* target, const T* a, const T* b, double factor) const {
    const int64_t stride = key.stride();
    for (int64_t x = 0; x < geometry.padded; x += kLanes<T>) {
      Vector<T> sum{};
      for (int64_t c = 0; c < channels; ++c) sum += NATTEN_EXT_ISA::load(a + c * stride + x) * NATTEN_EXT_ISA::load(b + c * stride + x);
      store(target + channels * stride + x, sum * T(factor));
    }
  }

  // gradient[c][x] -= a log2(e) * sums[x] * keys[c][x] of one row: the l2 term of a key gradient.
  void subtract_keys(T* gradient, const T* sums, int64_t row, const RowRing<T>& keys) const {
    const int64_t stride = keys.stride();
    const T* from = keys.row(row);
    for (int64_t x = 0; x < geometry.padded; x += kLanes<T>) {
      const Vector<T> factor = NATTEN_EXT_ISA::load(sums + x) * query_scale;
      for (int64_t c = 0; c < channels; ++c) {
        T* target = gradient + c * stride + x;
        store(target, NATTEN_EXT_ISA::load(target) - factor * NATTEN_EXT_ISA::load(from + c * stride + x));
      }
    }
  }

 private:
  const Arguments& a_;
  int64_t next_key_ = -1;

 public:
  const RowTransposer<T> transposer;
  const int64_t channels, score_channels, query_channels;
  const T query_scale;
  NeighborhoodJob job{};
  ClassGeometry<T> geometry;
  RowRing<T> query, key, value;  // queries times a log2(e)
  ExpandedTable<T> table;        // times log2(e)
};

template <class T>
class NeighborhoodForward {
 public:
  static constexpr int L = kLanes<T>;

  explicit NeighborhoodForward(const Arguments& a) : a_(a), rows_(a, 0) { output_.resize(a.problem.head_dim); }

  void run(const NeighborhoodJob& job) {
    const ClassGeometry<T>& g = rows_.geometry;
    if (rows_.start(job)) weights_.resize(g);
    const int64_t blocks = static_cast<int64_t>(g.query_blocks.size());
    for (int64_t y = job.begin; y < job.end; y += kGroup) {
      const RowGroup group(g, y, job.end);
      rows_.load_queries(group);
      rows_.load_keys(group, [](int64_t) {});
      for (int64_t begin = 0; begin < blocks; begin += kStrip) strip(group, begin, std::min(blocks, begin + kStrip));
    }
  }

 private:
  void strip(const RowGroup& group, int64_t begin, int64_t end) {
    const ClassGeometry<T>& g = rows_.geometry;
    score_strip(g, group, begin, end, rows_.query, rows_.key, rows_.score_channels, weights_, false);
    for (int64_t b = begin; b < end; ++b) {
      for (int r = 0; r < group.count; ++r) inverse_sum_[b - begin][r] = softmax(group, r, b, weights_.block(r, b - begin));
    }
    gather_keys<T>(g, group, begin, end, weights_, rows_.value, rows_.channels, terms_, output_, false);
    for (int64_t b = begin; b < end; ++b) {
      for (int r = 0; r < group.count; ++r) {
        T* output = output_.row(b - begin, r);
        for (int64_t c = 0; c < rows_.channels; ++c) store(output + c * L, load(output + c * L) * inverse_sum_[b - begin][r]);
        rows_.transposer.unload(output, L, a_.output, rows_.job, group.y + r, b * L, 1);
      }
    }
  }

  // Scores of one block of queries to exponentials; writes lse and returns the inverse of their sums.
  Vector<T> softmax(const RowGroup& group, int r, int64_t b, T* weights) {
    const ClassGeometry<T>& g = rows_.geometry;
    const int64_t n = g.ky * g.kx, x = b * L, y = group.y + r;
    Vector<T> top = broadcast<T>(-std::numeric_limits<T>::infinity());
    if (a_.bias) {
      // Rows of the table follow each other as rows of keys do.
      const T* table = rows_.table.row(g.query_blocks[b].table, group.start[r] - y);
      for (int64_t i = 0; i < n; ++i) {
        const Vector<T> s = load(weights + i * L) + load(table + i * L);
        store(weights + i * L, s);
        top = maximum<T>(top, s);
      }
    } else {
      for (int64_t i = 0; i < n; ++i) top = maximum<T>(top, load(weights + i * L));
    }
    Vector<T> sums[2] = {};  // two, because additions take longer than they keep the units busy
    int64_t i = 0;
    for (; i + 2 <= n; i += 2) {
      for (int k = 0; k < 2; ++k) {
        const Vector<T> e = exp2(load(weights + (i + k) * L) - top);
        sums[k] += e;
        store(weights + (i + k) * L, e);
      }
    }
    for (; i < n; ++i) {
      const Vector<T> e = exp2(load(weights + i * L) - top);
      sums[0] += e;
      store(weights + i * L, e);
    }
    const Vector<T> sum = sums[0] + sums[1];
    const NeighborhoodJob& job = rows_.job;
    T* lse = static_cast<T*>(a_.lse) + job.lse_offset(a_.problem, y);
    for (int lane = 0; lane < L && x + lane < g.width; ++lane) {
      lse[(x + lane) * job.window.dilation_x] = (top[lane] + std::log2(sum[lane])) * kLn2<T>;
    }
    return 1 / sum;
  }

  const Arguments& a_;
  NeighborhoodRows<T> rows_;
  StripWeights<T> weights_;
  StripResults<T> output_;
  Vector<T> inverse_sum_[kStrip][kGroup];
  std::vector<Term<T>> terms_;
};

template <class T>
void neighborhood_forward(const Arguments& a, HeadRange heads) {
  const HeadJobs jobs(a.problem, heads.first, 32);
  for_each_task(
      heads.count() * jobs.count(), [&] { return NeighborhoodForward<T>(a); },
      [&](NeighborhoodForward<T>& worker, int64_t task) {
        worker.run(jobs.job(heads.first + task / jobs.count(), task % jobs.count()));
      });
}

}  // namespace natten_ext::NATTEN_EXT_ISA
