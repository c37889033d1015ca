// P and X of the neighborhood kernels, see dense_saved.h: what all orders after the forward hold of a group of rows.
#pragma once

#include <limits>

#include "neighborhood_products.h"

namespace natten_ext::NATTEN_EXT_ISA {

// The two parts of lse.
template <class T>
class SavedRows {
 public:
  void resize(const ClassGeometry<T>& g) {
    for (int r = 0; r < kGroup; ++r) base[r] = Buffer<T>(g.padded), log_sum[r] = Buffer<T>(g.padded);
  }
  void load(const NeighborhoodRows<T>& rows, const RowGroup& group) {
    for (int r = 0; r < group.count; ++r) {
      // Of lanes without a query P vanishes.
      rows.load_lanes(base[r], rows.lse_part(0), group.row(r), std::numeric_limits<T>::infinity());
      rows.load_lanes(log_sum[r], rows.lse_part(1), group.row(r), 0);
    }
  }

  Buffer<T> base[kGroup], log_sum[kGroup];
};

// The cotangents (gQ, gK, gV, gbias), and X. For l2 the queries' rows may have one channel more than the scores have: 1,
// for sums per key.
template <class T>
class CotangentRows {
 public:
  explicit CotangentRows(const Arguments& a) : a_(a) {}

  // For jobs of new geometry.
  void resize(const NeighborhoodRows<T>& rows) {
    rows.resize_queries(query, rows.query_channels);
    rows.resize_keys(key, rows.score_channels);
    rows.resize_keys(value, rows.channels);
    tables_.clear();
  }
  // For a job's head.
  void start(const NeighborhoodRows<T>& rows) {
    if (!a_.cot_bias) return;
    table_ = &tables_[rows.job.first().head];
    if (!table_->empty()) return;
    table_->fill(rows.geometry, a_.problem, a_.cot_bias, rows.job, [](T value) { return value; }, 0);
  }
  void load_queries(const NeighborhoodRows<T>& rows, const RowGroup& group) {
    for (int r = 0; a_.cot_query && r < group.count; ++r) {
      const Row row = group.row(r);
      rows.transposer.load(query.row(row), query.stride(), a_.cot_query, rows.job, row, rows.query_scale);
      if (rows.query_channels > rows.score_channels) fill_sum_channel(rows, row);
    }
  }
  void fill_sum_channel(const NeighborhoodRows<T>& rows, Row row) {
    rows.fill_ones(query.row(row) + rows.score_channels * query.stride());
  }
  void load_keys(const NeighborhoodRows<T>& rows, Row row) {
    if (a_.cot_key) {
      rows.transposer.load(key.row(row), key.stride(), a_.cot_key, rows.job, row, 1);
      if (a_.problem.l2) rows.key_products(key.row(row), rows.key.row(row), key.row(row), -rows.query_scale);
    }
    if (a_.cot_value) rows.transposer.load(value.row(row), value.stride(), a_.cot_value, rows.job, row, 1);
  }

  // The products of a strip of scores, of which X is read.
  void products(const NeighborhoodRows<T>& rows, const RowGroup& group, int64_t begin, int64_t end,
                const StripWeights<T>& x) const {
    if (a_.cot_query) score_strip(rows.geometry, group, begin, end, query, rows.key, rows.channels, x, false);
    if (!a_.cot_key) return;
    score_strip(rows.geometry, group, begin, end, rows.query, key, rows.score_channels, x, static_cast<bool>(a_.cot_query));
  }
  // The values of gbias for one block of queries of row r and the keys of a plane; null without any.
  const T* table(int64_t which, const RowGroup& group, int r, int64_t plane) const {
    return a_.cot_bias ? table_->row(which, group, r, plane) : nullptr;
  }
  // X from what `x` and the table hold at i.
  NATTEN_EXT_INLINE Vector<T> read(const T* x, const T* table, int64_t i) const {
    Vector<T> value{};
    if (a_.cot_query || a_.cot_key) value = NATTEN_EXT_ISA::load(x + i) * kLn2<T>;  // queries carry log2(e)
    if (table != nullptr) value += NATTEN_EXT_ISA::load(table + i);
    return value;
  }

  RowRing<T> query, key, value;  // queries times a log2(e)

 private:
  const Arguments& a_;
  std::map<int64_t, ExpandedTable<T>> tables_;  // by head, of interleaved ones by the first
  ExpandedTable<T>* table_ = nullptr;           // the job's
};

}  // namespace natten_ext::NATTEN_EXT_ISA
