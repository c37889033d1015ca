// The third product of the neighborhood kernels: sums over the queries that attend a key.
#pragma once

#include <algorithm>
#include <vector>

#include "neighborhood_products.h"

namespace natten_ext::NATTEN_EXT_ISA {

// Weights of a whole row of blocks, for the sums over queries: rows[r] is [row of keys][weights_stride].
template <class T>
struct RowWeights {
  void resize(const ClassGeometry<T>& g) {
    const int64_t size = g.key_rows * g.weights_stride;
    for (int r = 0; r < std::min<int64_t>(kGroup, g.axis_y.length); ++r) {
      buffers[r] = Buffer<T>(size);
      std::fill_n(buffers[r].data(), size, T(0));
      rows[r] = buffers[r];
    }
  }
  Buffer<T> buffers[kGroup];
  T* rows[kGroup] = {};
};

// Adds a group's contributions to the key gradients of a job's rows: gradient[key][c][x] += sum over the
// queries that attend a key of weight * query. Where borders make blocks of adjacent keys irregular, other queries take part
// with a weight of zero; `strange` says that some may be NaN or infinite, so that they must not.
template <class T>
class QueryGatherer {
 public:
  void run(const ClassGeometry<T>& g, const RowGroup& group, const RowWeights<T>& weights, const RowRing<T>& query,
           int64_t channels, const RowRing<T>& gradient, const NeighborhoodJob& job, bool strange) {
    const int64_t end = std::min(job.rows.end, group.last());
    for (int64_t z = group.planes.start; z < group.planes.end; ++z) {
      if (!job.owns_plane(z)) continue;
      for (int64_t y = std::max(job.rows.start, group.first()); y < end; y += kGroup) {
        const int rows = static_cast<int>(std::min<int64_t>(kGroup, end - y));
        for (int64_t b = job.columns.owned.start * g.step / kLanes<T>; b < static_cast<int64_t>(g.key_blocks.size()); ++b) {
          const KeyBlock& block = g.key_blocks[b];
          const bool alone = strange && !block.regular && !g.interleaved;
          if (alone) one_by_one(g, group, weights, query, channels, gradient, {z, y}, rows, b * kLanes<T>, block);
          else together(g, group, weights, query, channels, gradient, {z, y}, rows, b * kLanes<T>, block);
        }
      }
    }
  }

 private:
  // For one block of keys of the rows that begin at `key`.
  void together(const ClassGeometry<T>& g, const RowGroup& group, const RowWeights<T>& weights, const RowRing<T>& query,
                int64_t channels, const RowRing<T>& gradient, Row key, int rows, int64_t x, const KeyBlock& block) {
    constexpr int L = kLanes<T>;
    staged_.resize(std::max<size_t>(staged_.size(), kGroup * kGroup * block.count * L));
    Term<T> terms[kGroup];
    for (int r = 0; r < group.count; ++r) {
      Term<T>& term = terms[r];
      term = {query.row(group.row(r)) + x + block.first * g.step, {}, rows, 0, L, block.count};
      for (int i = 0; i < rows; ++i) {
        if (!group.attends(r, key.y + i)) continue;
        term.first = std::min(term.first, i);
        term.last = i + 1;
        const T* from = weights.rows[r] + group.place(r, {key.z, key.y + i}) * g.weights_stride;
        if (block.regular) {
          // Farther queries see the key at a smaller j.
          term.a[i] = from + (g.centre - block.first) * g.padded + x + block.first * g.step;
          term.a_stride = g.step - g.padded;
        } else {
          T* staged = staged_.data() + (kGroup * r + i) * block.count * L;
          const int32_t* position = g.positions.data() + block.index;
          const int64_t at_once = g.step;  // lanes that lie together
          for (int64_t m = 0; m < block.count * L; m += at_once) {
            if (at_once == L) store(staged + m, load(from + position[m]));
            else staged[m] = from[position[m]];
          }
          term.a[i] = staged;
        }
      }
      if (term.last == 0) term.first = 0;
    }
    T* target[kGroup] = {};
    for (int i = 0; i < rows; ++i) target[i] = gradient.row({key.z, key.y + i}) + x;
    const auto sum = [&](auto read) {
      for (int64_t c = 0; c < channels;) {
        c = sum_terms<T, 0>(terms, group.count, c, channels, query.stride(), read, target, rows, gradient.stride(), true);
      }
    };
    g.interleaved ? sum(Interleaved<T>()) : sum(Straight<T>());
  }

  // The same, of the queries that attend each key and no others.
  void one_by_one(const ClassGeometry<T>& g, const RowGroup& group, const RowWeights<T>& weights,
                  const RowRing<T>& query, int64_t channels, const RowRing<T>& gradient, Row key, int rows,
                  int64_t x, const KeyBlock& block) const {
    constexpr int L = kLanes<T>;
    const int32_t* positions = g.positions.data() + block.index;
    for (Row row = key; row.y < key.y + rows; ++row.y) {
      for (int64_t i = 0; i < channels * L; ++i) {
        const int64_t c = i / L, lane = i % L;
        T sum = 0;
        for (int r = 0; r < group.count; ++r) {
          if (!group.attends(r, row.y)) continue;
          const T* from = weights.rows[r] + group.place(r, row) * g.weights_stride;
          const T* queries = query.row(group.row(r)) + c * query.stride() + x + block.first + lane;
          for (int64_t m = 0; m < block.count; ++m) {
            const int32_t position = positions[m * L + lane];
            if (position != g.kx * g.padded) sum += from[position] * queries[m];
          }
        }
        gradient.row(row)[c * gradient.stride() + x + lane] += sum;
      }
    }
  }

  std::vector<T> staged_;
};

}  // namespace natten_ext::NATTEN_EXT_ISA
