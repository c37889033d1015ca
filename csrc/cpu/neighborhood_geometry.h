// Where the windows of neighborhood attention lie, in vectors.
//
// A job is a band of query rows of one residue class of one (batch, head). Inside a class the window is an ordinary
// sliding window. Rows are held transposed, [channel][x], one query (or key) per lane, so that every product is made
// of whole vectors with no work on keys outside the window: a vector of queries at x meets key j of its windows in
// one (unaligned) load at start(x) + j, followed by a permutation where a border shifts some of the windows.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "../geometry.h"
#include "kernels.h"
#include "simd.h"

namespace natten_ext::NATTEN_EXT_ISA {

// A vector of adjacent queries on the x axis.
template <class T>
struct QueryBlock {
  int64_t start;         // window start of the first query
  Integers<T> shift;     // window start of each query minus that
  bool regular;          // shift is 0, 1, 2, ...: no permutation needed
  int64_t table;         // which expanded table it uses
};

// A vector of adjacent keys: which queries attend them, as distances query - key.
struct KeyBlock {
  int64_t first, count;  // distances first, first + 1, ... first + count - 1
  bool regular;          // every key is attended at all of them, by key (kernel / 2 - distance) of the window
  int64_t index;         // otherwise: where its [count][lanes] positions in a row of weights begin
};

// The windows of one kernel in classes of one size. Blocks cover `padded` positions; those past the class repeat
// the last query's window.
template <class T>
class ClassGeometry {
 public:
  static constexpr int L = kLanes<T>;
  // The offset of lanes past the class.
  static constexpr int32_t kNoQuery = std::numeric_limits<int32_t>::min();

  void prepare(int64_t class_height, int64_t class_width, int64_t kernel_y, int64_t kernel_x) {
    height = class_height, width = class_width, ky = kernel_y, kx = kernel_x;
    padded = round_up_to_lanes<T>(width);
    margin = round_up_to_lanes<T>(kx);
    row_stride = margin + padded + margin + L;
    weights_stride = kx * padded + L;
    query_blocks.clear();
    key_blocks.clear();
    positions.clear();
    table_offsets.clear();
    tables = 1;
    for (int64_t j = 0; j < kx; ++j) table_offsets.insert(table_offsets.end(), L, static_cast<int32_t>(j - kx / 2));
    for (int64_t x = 0; x < padded; x += L) {
      add_query_block(x);
      add_key_block(x);
    }
  }

  int64_t start_x(int64_t x) const { return class_window_start(std::min(x, width - 1), width, kx); }
  int64_t start_y(int64_t y) const { return class_window_start(y, height, ky); }

  int64_t height = 0, width = 0, ky = 0, kx = 0;
  int64_t padded = 0, margin = 0;
  int64_t row_stride = 0;      // one channel of a row: margin, padded positions, margin
  int64_t weights_stride = 0;  // the weights of one row of queries on one row of keys: [kx][padded], then a zero
  int64_t tables = 0;          // distinct expanded tables; number 0 is that of regular blocks
  std::vector<QueryBlock<T>> query_blocks;
  std::vector<KeyBlock> key_blocks;
  std::vector<int32_t> positions;
  std::vector<int32_t> table_offsets;  // key - query of each value of a row of an expanded table, [table][kx][lanes]

 private:
  void add_query_block(int64_t x) {
    QueryBlock<T> block{start_x(x), {}, true, 0};
    for (int lane = 0; lane < L; ++lane) {
      block.shift[lane] = start_x(x + lane) - block.start;
      block.regular = block.regular && block.shift[lane] == lane;
    }
    if (!block.regular) {
      block.table = tables++;
      for (int64_t j = 0; j < kx; ++j) {
        for (int lane = 0; lane < L; ++lane) {
          table_offsets.push_back(x + lane < width ? static_cast<int32_t>(start_x(x + lane) + j - x - lane) : kNoQuery);
        }
      }
    }
    query_blocks.push_back(block);
  }

  void add_key_block(int64_t x) {
    const auto attends = [&](int64_t query, int64_t key) {
      return query >= 0 && query < width && key < width && start_x(query) <= key && key < start_x(query) + kx;
    };
    int64_t first = kx, last = -kx;
    for (int64_t key = x; key < x + L; ++key) {
      for (int64_t distance = 1 - kx; distance < kx; ++distance) {
        if (!attends(key + distance, key)) continue;
        first = std::min(first, distance);
        last = std::max(last, distance);
      }
    }
    KeyBlock block{first, last - first + 1, true, static_cast<int64_t>(positions.size())};
    for (int64_t distance = first; distance <= last; ++distance) {
      for (int64_t key = x; key < x + L; ++key) {
        const bool hit = attends(key + distance, key);
        const int64_t j = hit ? key - start_x(key + distance) : 0;
        block.regular = block.regular && hit && j == kx / 2 - distance;
        positions.push_back(static_cast<int32_t>(hit ? j * padded + key + distance : kx * padded));
      }
    }
    key_blocks.push_back(block);
  }
};

struct NeighborhoodJob {
  int64_t batch, head;
  HeadWindow window;
  int64_t residue_y, residue_x;
  int64_t class_height, class_width;
  int64_t begin, end;  // the band: rows of the class

  int64_t offset(const View& v, int64_t y, int64_t x) const {
    return batch * v.batch + head * v.head + (y * window.y.dilation + residue_y) * v.y +
           (x * window.x.dilation + residue_x) * v.x;
  }
  bool owns(int64_t y) const { return begin <= y && y < end; }
  bool owns_any(int64_t y, int64_t count) const { return y < end && y + count > begin; }
  int64_t lse_offset(const Problem& p, int64_t y) const {
    return ((batch * p.heads + head) * p.height + y * window.y.dilation + residue_y) * p.width + residue_x;
  }
};

// The jobs of one head, or of any other with the same window.
class HeadJobs {
 public:
  HeadJobs(const Problem& p, int64_t head, int64_t band_rows) : p_(p), window_(p.windows[head]) {
    const int64_t longest = class_length(p.height, window_.y.dilation, 0);
    bands_ = std::max<int64_t>(1, (longest + band_rows - 1) / band_rows);
  }
  int64_t count() const { return p_.batch * window_.y.dilation * window_.x.dilation * bands_; }
  NeighborhoodJob job(int64_t head, int64_t index) const {
    NeighborhoodJob job{};
    job.head = head;
    job.window = window_;
    const int64_t band = index % bands_;
    index /= bands_;
    job.residue_x = index % window_.x.dilation;
    index /= window_.x.dilation;
    job.residue_y = index % window_.y.dilation;
    job.batch = index / window_.y.dilation;
    job.class_height = class_length(p_.height, window_.y.dilation, job.residue_y);
    job.class_width = class_length(p_.width, window_.x.dilation, job.residue_x);
    job.begin = band * job.class_height / bands_;
    job.end = (band + 1) * job.class_height / bands_;
    return job;
  }

 private:
  const Problem& p_;
  HeadWindow window_;
  int64_t bands_;
};

// Rows that are worked on together: three of them fill 16 registers with accumulators.
constexpr int kGroup = 3;
// Blocks of queries that are worked on together: they share the cache lines of keys and values.
constexpr int64_t kStrip = 2;

// Up to kGroup adjacent rows of queries of a class and the rows of keys that they attend.
struct RowGroup {
  template <class T>
  RowGroup(const ClassGeometry<T>& g, int64_t y, int64_t end)
      : y(y), count(static_cast<int>(std::min<int64_t>(kGroup, end - y))), kernel(g.ky) {
    for (int r = 0; r < count; ++r) start[r] = g.start_y(y + r);
  }
  int64_t first() const { return start[0]; }
  int64_t last() const { return start[count - 1] + kernel; }  // one past
  bool attends(int r, int64_t key) const { return start[r] <= key && key < start[r] + kernel; }
  // The rows of queries that attend a row of keys are adjacent: [first, last).
  int first_attending(int64_t key) const {
    int r = 0;
    while (r < count && !attends(r, key)) ++r;
    return r;
  }
  int last_attending(int64_t key) const {
    int r = count;
    while (r > 0 && !attends(r - 1, key)) --r;
    return r;
  }

  int64_t y;
  int count;
  int64_t kernel, start[kGroup];
};

}  // namespace natten_ext::NATTEN_EXT_ISA
