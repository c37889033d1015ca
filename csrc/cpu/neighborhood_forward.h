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
      query.resize(2, query_channels, geometry);
      key.resize(geometry.ky + 1, score_channels, geometry);
      value.resize(geometry.ky + 1, channels, geometry);
      if (a_.bias) table.fill(geometry, a_.problem, a_.bias, job.head, kLog2E<T>);
    }
    next_key_ = -1;
    return changed;
  }

  void load_queries(const RowPair& pair) {
    for (int64_t y = pair.y; y < pair.y + pair.count; ++y) {
      transposer.load(query.row(y), query.stride(), a_.query, job, y, query_scale);
      if (a_.problem.l2) std::fill_n(query.row(y) + channels * query.stride(), geometry.width, T(1));
    }
  }

  // Brings in the rows of keys up to those of the pair; visit(row) may load more of each new row.
  template <class Visit>
  void load_keys(const RowPair& pair, const Visit& visit) {
    for (int64_t row = std::max(next_key_, pair.first()); row < pair.last(); ++row) {
      transposer.load(key.row(row), key.stride(), a_.key, job, row, 1);
      transposer.load(value.row(row), value.stride(), a_.value, job, row, 1);
      if (a_.problem.l2) key_products(key.row(row), key.row(row), key.row(row), -a_.problem.scale * kLog2E<double>);
      visit(row);
    }
    next_key_ = std::max(next_key_, pair.last());
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

  explicit NeighborhoodForward(const Arguments& a)
      : a_(a), rows_(a, 0), output_{Buffer<T>(a.problem.head_dim * L), Buffer<T>(a.problem.head_dim * L)} {}

  void run(const NeighborhoodJob& job) {
    const ClassGeometry<T>& g = rows_.geometry;
    if (rows_.start(job)) {
      for (auto& weights : weights_) weights = Buffer<T>(g.ky * g.kx * L);
    }
    T* const weights[2] = {weights_[0], weights_[1]};
    T* const output[2] = {output_[0], output_[1]};
    for (int64_t y = job.begin; y < job.end; y += 2) {
      const RowPair pair(g, y, job.end);
      rows_.load_queries(pair);
      rows_.load_keys(pair, [](int64_t) {});
      for (int64_t x = 0; x < g.width; x += L) {
        const QueryBlock<T>& block = g.query_blocks[x / L];
        score_block(g, pair, block, x, rows_.query, rows_.key, rows_.score_channels, weights, false);
        for (int r = 0; r < pair.count; ++r) softmax(pair, r, block, x);
        gather_keys<T>(g, pair, block, weights, rows_.value, rows_.channels, terms_, output, false);
        for (int r = 0; r < pair.count; ++r) {
          for (int64_t c = 0; c < rows_.channels; ++c) store(output[r] + c * L, load(output[r] + c * L) * inverse_sum_[r]);
          rows_.transposer.unload(output[r], L, a_.output, job, pair.y + r, x, 1);
        }
      }
    }
  }

 private:
  // Scores of one block of queries to exponentials; writes lse and the inverse of their sums.
  void softmax(const RowPair& pair, int r, const QueryBlock<T>& block, int64_t x) {
    const ClassGeometry<T>& g = rows_.geometry;
    const int64_t n = g.ky * g.kx;
    T* weights = weights_[r];
    Vector<T> top = broadcast<T>(-std::numeric_limits<T>::infinity());
    if (a_.bias) {
      // Rows of the table follow each other as rows of keys do.
      const T* table = rows_.table.row(block.table, pair.start[r] - (pair.y + r));
      for (int64_t i = 0; i < n; ++i) {
        const Vector<T> s = load(weights + i * L) + load(table + i * L);
        store(weights + i * L, s);
        top = maximum<T>(top, s);
      }
    } else {
      for (int64_t i = 0; i < n; ++i) top = maximum<T>(top, load(weights + i * L));
    }
    Vector<T> sum{};
    for (int64_t i = 0; i < n; ++i) {
      const Vector<T> e = exp2(load(weights + i * L) - top);
      sum += e;
      store(weights + i * L, e);
    }
    inverse_sum_[r] = 1 / sum;
    const NeighborhoodJob& job = rows_.job;
    T* lse = static_cast<T*>(a_.lse) + job.lse_offset(a_.problem, pair.y + r);
    for (int lane = 0; lane < L && x + lane < g.width; ++lane) {
      lse[(x + lane) * job.window.dilation_x] = (top[lane] + std::log2(sum[lane])) * kLn2<T>;
    }
  }

  const Arguments& a_;
  NeighborhoodRows<T> rows_;
  Buffer<T> weights_[2], output_[2];
  Vector<T> inverse_sum_[2];
  std::vector<Term<T>> terms_;
};

template <class T>
void neighborhood_forward(const Arguments& a) {
  const Problem& p = a.problem;
  std::vector<HeadJobs> heads;
  std::vector<int64_t> first_task{0};
  for (int64_t head = 0; head < p.heads; ++head) {
    heads.emplace_back(p, head, 32);
    first_task.push_back(first_task.back() + heads.back().count());
  }
  for_each_task(
      first_task.back(), [&] { return NeighborhoodForward<T>(a); },
      [&](NeighborhoodForward<T>& worker, int64_t task) {
        const int64_t head = std::upper_bound(first_task.begin(), first_task.end(), task) - first_task.begin() - 1;
        worker.run(heads[head].job(task - first_task[head]));
      });
}

}  // namespace natten_ext::NATTEN_EXT_ISA
