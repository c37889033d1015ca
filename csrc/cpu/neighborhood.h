// Shared parts of the neighborhood kernels.
//
// A job is a band of query rows of one residue class of one (batch, head). Inside a class the window is an ordinary
// sliding window. Rows are held transposed, [channel][x], one query (or key) per lane, so that every product is made
// of whole vectors with no work on keys outside the window: a vector of queries at x meets key j of its windows in
// one (unaligned) load at start(x) + j, followed by a permutation where a border shifts some of the windows.
#pragma once

#include <vector>

#include "../geometry.h"
#include "rows.h"

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
          table_offsets.push_back(static_cast<int32_t>(start_x(x + lane) + j - std::min(x + lane, width - 1)));
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
    return batch * v.batch + head * v.head + (y * window.dilation_y + residue_y) * v.y +
           (x * window.dilation_x + residue_x) * v.x;
  }
  bool owns(int64_t y) const { return begin <= y && y < end; }
  bool owns_any(int64_t y, int64_t count) const { return y < end && y + count > begin; }
  int64_t lse_offset(const Problem& p, int64_t y) const {
    return ((batch * p.heads + head) * p.height + y * window.dilation_y + residue_y) * p.width + residue_x;
  }
};

// The jobs of one head, or of any other with the same window.
class HeadJobs {
 public:
  HeadJobs(const Problem& p, int64_t head, int64_t band_rows) : p_(p), window_(p.windows[head]) {
    const int64_t longest = class_length(p.height, window_.dilation_y, 0);
    bands_ = std::max<int64_t>(1, (longest + band_rows - 1) / band_rows);
  }
  int64_t count() const { return p_.batch * window_.dilation_y * window_.dilation_x * bands_; }
  NeighborhoodJob job(int64_t head, int64_t index) const {
    NeighborhoodJob job{};
    job.head = head;
    job.window = window_;
    const int64_t band = index % bands_;
    index /= bands_;
    job.residue_x = index % window_.dilation_x;
    index /= window_.dilation_x;
    job.residue_y = index % window_.dilation_y;
    job.batch = index / window_.dilation_y;
    job.class_height = class_length(p_.height, window_.dilation_y, job.residue_y);
    job.class_width = class_length(p_.width, window_.dilation_x, job.residue_x);
    job.begin = band * job.class_height / bands_;
    job.end = (band + 1) * job.class_height / bands_;
    return job;
  }

 private:
  const Problem& p_;
  HeadWindow window_;
  int64_t bands_;
};

// A few rows [channel][x], addressed by row number: a ring over the rows of a class. Margins stay zero.
template <class T>
class RowRing {
 public:
  void resize(int64_t rows, int64_t channels, const ClassGeometry<T>& g) {
    if (rows * channels * g.row_stride > capacity_) {
      capacity_ = rows * channels * g.row_stride;
      buffer_ = Buffer<T>(capacity_);
    }
    rows_ = rows;
    channels_ = channels;
    stride_ = g.row_stride;
    margin_ = g.margin;
    std::fill(buffer_.data(), buffer_ + rows * channels * stride_, T(0));
  }
  // Channel 0 at x = 0.
  T* row(int64_t y) const { return buffer_ + (y % rows_) * channels_ * stride_ + margin_; }
  int64_t stride() const { return stride_; }
  void clear(int64_t y) {
    T* begin = row(y) - margin_;
    std::fill(begin, begin + channels_ * stride_, T(0));
  }

 private:
  Buffer<T> buffer_;
  int64_t capacity_ = 0, rows_ = 1, channels_ = 0, stride_ = 0, margin_ = 0;
};

// Moves rows of a tensor to and from [channel][x].
template <class T>
class RowTransposer {
 public:
  static constexpr int L = kLanes<T>;

  explicit RowTransposer(int64_t channels)
      : channels_(channels), padded_(round_up_to_lanes<T>(channels)), rows_(L * padded_), columns_(padded_ * L) {
    std::fill(rows_.data(), rows_ + L * padded_, T(0));
  }
  void load(T* target, int64_t stride, const View& v, const NeighborhoodJob& job, int64_t y, T factor) const {
    const int64_t step = job.window.dilation_x * v.x;
    for (int64_t x = 0; x < job.class_width; x += L) {
      const int64_t lanes = std::min<int64_t>(L, job.class_width - x);
      int64_t from = job.offset(v, y, x);
      for (int64_t lane = 0; lane < lanes; ++lane, from += step) {
        prefetch_row(v, from + 8 * L * step, channels_);
        load_row<T>(rows_ + lane * padded_, v, from, channels_, factor);
      }
      for (int64_t lane = lanes; lane < L; ++lane) std::fill_n(rows_ + lane * padded_, channels_, T(0));
      for (int64_t c = 0; c < channels_; c += L) {
        Vector<T> square[L];
        for (int i = 0; i < L; ++i) square[i] = NATTEN_EXT_ISA::load(rows_ + i * padded_ + c);
        transpose_square<T>(square);
        const int64_t kept = std::min<int64_t>(L, channels_ - c);
        for (int64_t i = 0; i < kept; ++i) store(target + (c + i) * stride + x, square[i]);
      }
    }
  }
  // One block of lanes at x, from source[channel][stride].
  void unload(const T* source, int64_t stride, const View& v, const NeighborhoodJob& job, int64_t y, int64_t x,
              T factor) const {
    for (int64_t c = 0; c < channels_; c += L) {
      Vector<T> square[L];
      for (int i = 0; i < L; ++i) square[i] = c + i < channels_ ? NATTEN_EXT_ISA::load(source + (c + i) * stride) : Vector<T>{};
      transpose_square<T>(square);
      for (int i = 0; i < L; ++i) store(rows_ + i * padded_ + c, square[i]);
    }
    const int64_t lanes = std::min<int64_t>(L, job.class_width - x);
    int64_t to = job.offset(v, y, x);
    for (int64_t lane = 0; lane < lanes; ++lane, to += job.window.dilation_x * v.x) {
      store_row<T>(rows_ + lane * padded_, v, to, channels_, factor);
    }
  }

 private:
  int64_t channels_, padded_;
  Buffer<T> rows_, columns_;
};

// Tables of one head, expanded to vectors: [table][key row - query row][kx][lanes].
template <class T>
class ExpandedTable {
 public:
  static constexpr int L = kLanes<T>;

  void resize(const ClassGeometry<T>& g) {
    rows_ = 2 * g.ky - 1;
    kx_ = g.kx;
    ky_ = g.ky;
    const int64_t size = g.tables * rows_ * kx_ * L;
    if (size > capacity_) buffer_ = Buffer<T>(capacity_ = size);
    size_ = size;
  }
  void clear() { std::fill(buffer_.data(), buffer_ + size_, T(0)); }
  // [kx][lanes] of a query block for keys `distance` rows below the query.
  T* row(int64_t table, int64_t distance) const { return buffer_ + (table * rows_ + distance + ky_ - 1) * kx_ * L; }

  // Calls visit(value, y, x) for each value, with its place in the head's table.
  template <class Visit>
  void for_each(const ClassGeometry<T>& g, const Problem& p, const Visit& visit) const {
    const int64_t center_y = p.table_kernel_y() - 1, center_x = p.table_kernel_x() - 1;
    for (int64_t table = 0; table < g.tables; ++table) {
      const int32_t* offsets = g.table_offsets.data() + table * kx_ * L;
      for (int64_t dy = 1 - ky_; dy < ky_; ++dy) {
        T* values = row(table, dy);
        for (int64_t i = 0; i < kx_ * L; ++i) visit(values[i], dy + center_y, offsets[i] + center_x);
      }
    }
  }
  void fill(const ClassGeometry<T>& g, const Problem& p, const View& bias, int64_t head, T factor) {
    resize(g);
    clear();
    for_each(g, p, [&](T& value, int64_t y, int64_t x) {
      value = load_value<T>(bias, head * bias.head + y * bias.y + x * bias.x) * factor;
    });
  }

 private:
  Buffer<T> buffer_;
  int64_t capacity_ = 0, size_ = 0, rows_ = 0, kx_ = 0, ky_ = 0;
};

// ------------------------------------------------------------------------------------------------ products

template <class T, bool PERMUTE>
NATTEN_EXT_INLINE Vector<T> load_shifted(const T* p, Integers<T> shift) {
  const Vector<T> v = load(p);
  if constexpr (PERMUTE) return permute<T>(v, shift);
  else return v;
}

// out[r][j] (+)= sum over channels of query[r][c] * key[c][j], for KEYS adjacent keys of one row.
template <class T, int ROWS, int KEYS, bool PERMUTE>
NATTEN_EXT_INLINE void score_tile(const T* const* query, const T* key, int64_t stride, int64_t channels,
                                  Integers<T> shift, T* const* out, bool add) {
  constexpr int L = kLanes<T>;
  Vector<T> sum[ROWS][KEYS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < KEYS; ++j) sum[r][j] = add ? load(out[r] + j * L) : Vector<T>{};
  }
  for (int64_t c = 0; c < channels; ++c) {
    Vector<T> q[ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) q[r] = load(query[r] + c * stride);
#pragma GCC unroll 8
    for (int j = 0; j < KEYS; ++j) {
      const Vector<T> k = load_shifted<T, PERMUTE>(key + c * stride + j, shift);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) sum[r][j] += q[r] * k;
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < KEYS; ++j) store(out[r] + j * L, sum[r][j]);
  }
}

// The smallest number of equal tiles of at most `limit`; their size.
constexpr int64_t even_tile(int64_t n, int64_t limit) {
  const int64_t tiles = (n + limit - 1) / limit;
  return (n + tiles - 1) / tiles;
}

// One row of keys for ROWS rows of queries.
template <class T, int ROWS, bool PERMUTE>
void score_row(const T* const* query, const T* key, int64_t stride, int64_t channels, Integers<T> shift, int64_t kx,
               T* const* out, bool add) {
  constexpr int L = kLanes<T>;
  constexpr int kLimit = ROWS == 1 ? 7 : 4;  // accumulators for 16 registers
  const int64_t tile = even_tile(kx, kLimit);
  T* target[ROWS];
  for (int64_t j = 0; j < kx; j += tile) {
    for (int r = 0; r < ROWS; ++r) target[r] = out[r] + j * L;
    const auto run = [&](auto keys) {
      score_tile<T, ROWS, decltype(keys)::value, PERMUTE>(query, key + j, stride, channels, shift, target, add);
    };
    switch (std::min(tile, kx - j)) {
      case 1: run(std::integral_constant<int, 1>{}); break;
      case 2: run(std::integral_constant<int, 2>{}); break;
      case 3: run(std::integral_constant<int, 3>{}); break;
      case 4: run(std::integral_constant<int, 4>{}); break;
      case 5: run(std::integral_constant<int, kLimit < 5 ? 1 : 5>{}); break;
      case 6: run(std::integral_constant<int, kLimit < 6 ? 1 : 6>{}); break;
      default: run(std::integral_constant<int, kLimit>{});
    }
  }
}

// Rows that are worked on together: three of them fill 16 registers with accumulators.
constexpr int kGroup = 3;
// Blocks of queries that are worked on together: they share the cache lines of keys and values.
constexpr int64_t kStrip = 2;

// A run of products that share one row of values b: for m < count and the output rows r with first <= r < last,
// out[r] += a[r][m * a_stride] * b[m].
template <class T>
struct Term {
  const T* b;
  const T* a[kGroup];
  int first, last;
  int64_t a_stride, count;
};

template <class T, int CHANNELS, bool PERMUTE, int FIRST, int LAST>
NATTEN_EXT_INLINE void sum_term(const Term<T>& term, const T* b, int64_t stride, Integers<T> shift,
                                Vector<T> (&sum)[kGroup][CHANNELS]) {
  const T* a[kGroup];
#pragma GCC unroll 4
  for (int r = FIRST; r < LAST; ++r) a[r] = term.a[r];
  for (int64_t m = 0; m < term.count; ++m, ++b) {
    Vector<T> weight[kGroup];
#pragma GCC unroll 4
    for (int r = FIRST; r < LAST; ++r) {
      weight[r] = load(a[r]);
      a[r] += term.a_stride;
    }
#pragma GCC unroll 8
    for (int c = 0; c < CHANNELS; ++c) {
      const Vector<T> value = load_shifted<T, PERMUTE>(b + c * stride, shift);
#pragma GCC unroll 4
      for (int r = FIRST; r < LAST; ++r) sum[r][c] += weight[r] * value;
    }
  }
}

template <class T, int CHANNELS, bool PERMUTE>
NATTEN_EXT_INLINE void sum_terms_tile(const Term<T>* terms, int64_t n, int64_t b_offset, int64_t stride,
                                      Integers<T> shift, T* const* out, int rows, int64_t out_offset,
                                      int64_t out_stride, bool add) {
  Vector<T> sum[kGroup][CHANNELS];
#pragma GCC unroll 4
  for (int r = 0; r < kGroup; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < CHANNELS; ++c) sum[r][c] = Vector<T>{};
  }
  for (int64_t i = 0; i < n; ++i) {
    const Term<T>& term = terms[i];
    const T* b = term.b + b_offset;
    switch (term.first * 4 + term.last) {
      case 1: sum_term<T, CHANNELS, PERMUTE, 0, 1>(term, b, stride, shift, sum); break;
      case 2: sum_term<T, CHANNELS, PERMUTE, 0, 2>(term, b, stride, shift, sum); break;
      case 3: sum_term<T, CHANNELS, PERMUTE, 0, 3>(term, b, stride, shift, sum); break;
      case 6: sum_term<T, CHANNELS, PERMUTE, 1, 2>(term, b, stride, shift, sum); break;
      case 7: sum_term<T, CHANNELS, PERMUTE, 1, 3>(term, b, stride, shift, sum); break;
      case 11: sum_term<T, CHANNELS, PERMUTE, 2, 3>(term, b, stride, shift, sum); break;
      default: break;  // no row takes part
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kGroup; ++r) {
    if (r >= rows) break;
#pragma GCC unroll 8
    for (int c = 0; c < CHANNELS; ++c) {
      T* target = out[r] + out_offset + c * out_stride;
      store(target, add ? load(target) + sum[r][c] : sum[r][c]);
    }
  }
}

// One group of channels from c on: out[r][c] (+)= sum over terms and m of a[r][m] * b[c][m]. Returns the next c.
template <class T, bool PERMUTE>
int64_t sum_terms(const Term<T>* terms, int64_t n, int64_t c, int64_t channels, int64_t stride, Integers<T> shift,
                  T* const* out, int rows, int64_t out_stride, bool add) {
  const int64_t from = c * stride, to = c * out_stride;
  if (c + 4 <= channels) {
    sum_terms_tile<T, 4, PERMUTE>(terms, n, from, stride, shift, out, rows, to, out_stride, add);
    return c + 4;
  }
  sum_terms_tile<T, 1, PERMUTE>(terms, n, from, stride, shift, out, rows, to, out_stride, add);
  return c + 1;
}

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

// Working memory for the weights of a strip: rows[r] is [block of the strip][ky * kx][lanes].
template <class T>
struct StripWeights {
  void resize(const ClassGeometry<T>& g) {
    block_size = g.ky * g.kx * kLanes<T>;
    for (int r = 0; r < kGroup; ++r) {
      buffers[r] = Buffer<T>(kStrip * block_size);
      std::fill_n(buffers[r].data(), kStrip * block_size, T(0));
      rows[r] = buffers[r];
    }
  }
  T* block(int r, int64_t b) const { return rows[r] + b * block_size; }

  int64_t block_size = 0;
  Buffer<T> buffers[kGroup];
  T* rows[kGroup] = {};
};

// Scores of the blocks [begin, end) of a group of rows: (+)= query . key.
template <class T>
void score_strip(const ClassGeometry<T>& g, const RowGroup& group, int64_t begin, int64_t end, const RowRing<T>& query,
                 const RowRing<T>& key, int64_t channels, const StripWeights<T>& out, bool add) {
  constexpr int L = kLanes<T>;
  for (int64_t row = group.first(); row < group.last(); ++row) {
    const int first = group.first_attending(row), n = group.last_attending(row) - first;
    for (int64_t b = begin; b < end; ++b) {
      const QueryBlock<T>& block = g.query_blocks[b];
      const T* q[kGroup];
      T* target[kGroup];
      for (int i = 0; i < n; ++i) {
        q[i] = query.row(group.y + first + i) + b * L;
        target[i] = out.block(first + i, b - begin) + (row - group.start[first + i]) * g.kx * L;
      }
      const T* k = key.row(row) + block.start;
      const auto run = [&](auto rows, auto permuted) {
        score_row<T, decltype(rows)::value, decltype(permuted)::value>(q, k, key.stride(), channels, block.shift, g.kx,
                                                                       target, add);
      };
      const auto run_rows = [&](auto rows) { block.regular ? run(rows, std::false_type{}) : run(rows, std::true_type{}); };
      if (n == 3) run_rows(std::integral_constant<int, 3>{});
      else if (n == 2) run_rows(std::integral_constant<int, 2>{});
      else run_rows(std::integral_constant<int, 1>{});
    }
  }
}

// Working memory for the results of a strip: [block of the strip][row][channel][lanes].
template <class T>
struct StripResults {
  void resize(int64_t new_channels) {
    channels = new_channels;
    buffer = Buffer<T>(kStrip * kGroup * channels * kLanes<T>);
    std::fill_n(buffer.data(), kStrip * kGroup * channels * kLanes<T>, T(0));
  }
  T* row(int64_t b, int r) const { return buffer + (b * kGroup + r) * channels * kLanes<T>; }

  int64_t channels = 0;
  Buffer<T> buffer;
};

// Sums over the windows of the blocks [begin, end) of a group of rows: out (+)= sum of weight * value.
template <class T>
void gather_keys(const ClassGeometry<T>& g, const RowGroup& group, int64_t begin, int64_t end,
                 const StripWeights<T>& weights, const RowRing<T>& value, int64_t channels,
                 std::vector<Term<T>>& terms, const StripResults<T>& out, bool add) {
  constexpr int L = kLanes<T>;
  const int64_t rows = group.last() - group.first();
  terms.resize((end - begin) * rows);
  for (int64_t b = begin; b < end; ++b) {
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = group.first() + i;
      Term<T>& term = terms[(b - begin) * rows + i];
      term = {value.row(row) + g.query_blocks[b].start, {}, group.first_attending(row), group.last_attending(row), L, g.kx};
      for (int r = term.first; r < term.last; ++r) {
        term.a[r] = weights.block(r, b - begin) + (row - group.start[r]) * g.kx * L;
      }
    }
  }
  for (int64_t c = 0, next = 0; c < channels; c = next) {
    for (int64_t b = begin; b < end; ++b) {
      const QueryBlock<T>& block = g.query_blocks[b];
      const Term<T>* from = terms.data() + (b - begin) * rows;
      T* target[kGroup];
      for (int r = 0; r < kGroup; ++r) target[r] = out.row(b - begin, r);
      next = block.regular ? sum_terms<T, false>(from, rows, c, channels, value.stride(), block.shift, target,
                                                 group.count, L, add)
                           : sum_terms<T, true>(from, rows, c, channels, value.stride(), block.shift, target,
                                                group.count, L, add);
    }
  }
}

// Weights of a whole row of blocks, for the sums over queries: rows[r] is [ky][weights_stride].
template <class T>
struct RowWeights {
  void resize(const ClassGeometry<T>& g) {
    for (int r = 0; r < kGroup; ++r) {
      buffers[r] = Buffer<T>(g.ky * g.weights_stride);
      std::fill_n(buffers[r].data(), g.ky * g.weights_stride, T(0));
      rows[r] = buffers[r];
    }
  }
  Buffer<T> buffers[kGroup];
  T* rows[kGroup] = {};
};

// Adds a group's contributions to the rows of key gradients [begin, end): gradient[key][c][x] += sum over the
// queries that attend a key of weight * query.
template <class T>
class QueryGatherer {
 public:
  void run(const ClassGeometry<T>& g, const RowGroup& group, const RowWeights<T>& weights, const RowRing<T>& query,
           int64_t channels, const RowRing<T>& gradient, int64_t begin, int64_t end) {
    constexpr int L = kLanes<T>;
    begin = std::max(begin, group.first());
    end = std::min(end, group.last());
    for (int64_t key = begin; key < end; key += kGroup) {
      const int rows = static_cast<int>(std::min<int64_t>(kGroup, end - key));
      for (int64_t b = 0; b < static_cast<int64_t>(g.key_blocks.size()); ++b) {
        const KeyBlock& block = g.key_blocks[b];
        const int64_t x = b * L;
        staged_.resize(std::max<size_t>(staged_.size(), kGroup * kGroup * block.count * L));
        Term<T> terms[kGroup];
        for (int r = 0; r < group.count; ++r) {
          Term<T>& term = terms[r];
          term = {query.row(group.y + r) + x + block.first, {}, rows, 0, L, block.count};
          for (int i = 0; i < rows; ++i) {
            if (!group.attends(r, key + i)) continue;
            term.first = std::min(term.first, i);
            term.last = i + 1;
            const T* from = weights.rows[r] + (key + i - group.start[r]) * g.weights_stride;
            if (block.regular) {
              // Farther queries see the key at a smaller j.
              term.a[i] = from + (g.kx / 2 - block.first) * g.padded + x + block.first;
              term.a_stride = 1 - g.padded;
            } else {
              T* staged = staged_.data() + (kGroup * r + i) * block.count * L;
              const int32_t* position = g.positions.data() + block.index;
              for (int64_t m = 0; m < block.count * L; ++m) staged[m] = from[position[m]];
              term.a[i] = staged;
            }
          }
          if (term.last == 0) term.first = 0;
        }
        T* target[kGroup] = {};
        for (int i = 0; i < rows; ++i) target[i] = gradient.row(key + i) + x;
        for (int64_t c = 0; c < channels;) {
          c = sum_terms<T, false>(terms, group.count, c, channels, query.stride(), Integers<T>{}, target, rows,
                                  gradient.stride(), true);
        }
      }
    }
  }

 private:
  std::vector<T> staged_;
};

}  // namespace natten_ext::NATTEN_EXT_ISA
