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
    tables = 1;
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

 private:
  void add_query_block(int64_t x) {
    QueryBlock<T> block{start_x(x), {}, true, 0};
    for (int lane = 0; lane < L; ++lane) {
      block.shift[lane] = start_x(x + lane) - block.start;
      block.regular = block.regular && block.shift[lane] == lane;
    }
    if (!block.regular) block.table = tables++;
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
  int64_t lse_offset(const Problem& p, int64_t y) const {
    return ((batch * p.heads + head) * p.height + y * window.dilation_y + residue_y) * p.width + residue_x;
  }
};

// The jobs of one head, in an order of their own.
class HeadJobs {
 public:
  HeadJobs(const Problem& p, int64_t head, int64_t band_rows) : p_(p), head_(head), window_(p.windows[head]) {
    const int64_t longest = class_length(p.height, window_.dilation_y, 0);
    bands_ = std::max<int64_t>(1, (longest + band_rows - 1) / band_rows);
  }
  int64_t count() const { return p_.batch * window_.dilation_y * window_.dilation_x * bands_; }
  NeighborhoodJob job(int64_t index) const {
    NeighborhoodJob job{};
    job.head = head_;
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
  int64_t head_;
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

  // Calls visit(vector position, y, x) for each value, with its place in the head's table.
  template <class Visit>
  void for_each(const ClassGeometry<T>& g, const Problem& p, const Visit& visit) const {
    for (int64_t b = 0; b < static_cast<int64_t>(g.query_blocks.size()); ++b) {
      const QueryBlock<T>& block = g.query_blocks[b];
      if (block.regular && b != first_regular(g)) continue;
      for (int64_t dy = 1 - ky_; dy < ky_; ++dy) {
        T* values = row(block.table, dy);
        for (int64_t j = 0; j < kx_; ++j) {
          for (int lane = 0; lane < L; ++lane) {
            const int64_t x = std::min(b * L + lane, g.width - 1);
            visit(values[j * L + lane], dy + p.table_kernel_y() - 1, g.start_x(x) + j - x + p.table_kernel_x() - 1);
          }
        }
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
  static int64_t first_regular(const ClassGeometry<T>& g) {
    for (int64_t b = 0; b < static_cast<int64_t>(g.query_blocks.size()); ++b) {
      if (g.query_blocks[b].regular) return b;
    }
    return -1;
  }
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

// One row of keys for ROWS rows of queries.
template <class T, int ROWS, bool PERMUTE>
void score_row(const T* const* query, const T* key, int64_t stride, int64_t channels, Integers<T> shift, int64_t kx,
               T* const* out, bool add) {
  constexpr int L = kLanes<T>;
  T* target[ROWS];
  for (int64_t j = 0; j < kx;) {
    for (int r = 0; r < ROWS; ++r) target[r] = out[r] + j * L;
    const int64_t left = kx - j;
    if (left >= 4) {
      score_tile<T, ROWS, 4, PERMUTE>(query, key + j, stride, channels, shift, target, add);
      j += 4;
    } else if (left == 3) {
      score_tile<T, ROWS, 3, PERMUTE>(query, key + j, stride, channels, shift, target, add);
      j += 3;
    } else {
      score_tile<T, ROWS, 1, PERMUTE>(query, key + j, stride, channels, shift, target, add);
      j += 1;
    }
  }
}

// A run of products that share one row of values b: for m < count, out[r] += a[r][m * a_stride] * b[m].
// A null a[r] means that output row r takes no part.
template <class T>
struct Term {
  const T* b;
  const T* a[2];
  int64_t a_stride, count;
};

template <class T, int CHANNELS, bool PERMUTE>
NATTEN_EXT_INLINE void sum_terms_tile(const Term<T>* terms, int64_t n, int64_t b_offset, int64_t stride,
                                      Integers<T> shift, T* out0, T* out1, int64_t out_stride, bool add) {
  Vector<T> sum0[CHANNELS], sum1[CHANNELS];
#pragma GCC unroll 8
  for (int c = 0; c < CHANNELS; ++c) sum0[c] = sum1[c] = Vector<T>{};
  for (int64_t i = 0; i < n; ++i) {
    const Term<T>& term = terms[i];
    const T* b = term.b + b_offset;
    if (term.a[0] != nullptr && term.a[1] != nullptr) {
      const T *a0 = term.a[0], *a1 = term.a[1];
      for (int64_t m = 0; m < term.count; ++m, ++b, a0 += term.a_stride, a1 += term.a_stride) {
        const Vector<T> w0 = load(a0), w1 = load(a1);
#pragma GCC unroll 8
        for (int c = 0; c < CHANNELS; ++c) {
          const Vector<T> value = load_shifted<T, PERMUTE>(b + c * stride, shift);
          sum0[c] += w0 * value;
          sum1[c] += w1 * value;
        }
      }
    } else if (term.a[0] != nullptr) {
      const T* a = term.a[0];
      for (int64_t m = 0; m < term.count; ++m, ++b, a += term.a_stride) {
        const Vector<T> w = load(a);
#pragma GCC unroll 8
        for (int c = 0; c < CHANNELS; ++c) sum0[c] += w * load_shifted<T, PERMUTE>(b + c * stride, shift);
      }
    } else if (term.a[1] != nullptr) {
      const T* a = term.a[1];
      for (int64_t m = 0; m < term.count; ++m, ++b, a += term.a_stride) {
        const Vector<T> w = load(a);
#pragma GCC unroll 8
        for (int c = 0; c < CHANNELS; ++c) sum1[c] += w * load_shifted<T, PERMUTE>(b + c * stride, shift);
      }
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < CHANNELS; ++c) {
    T* target = out0 + c * out_stride;
    store(target, add ? load(target) + sum0[c] : sum0[c]);
    if (out1 == nullptr) continue;
    target = out1 + c * out_stride;
    store(target, add ? load(target) + sum1[c] : sum1[c]);
  }
}

// out[r][c] (+)= sum over terms and m of a[r][m] * b[c][m], for all channels and up to two output rows.
template <class T, bool PERMUTE>
void sum_terms(const Term<T>* terms, int64_t n, int64_t channels, int64_t stride, Integers<T> shift, T* out0, T* out1,
               int64_t out_stride, bool add) {
  int64_t c = 0;
  const auto second = [&] { return out1 == nullptr ? nullptr : out1 + c * out_stride; };
  for (; c + 4 <= channels; c += 4) {
    sum_terms_tile<T, 4, PERMUTE>(terms, n, c * stride, stride, shift, out0 + c * out_stride, second(), out_stride, add);
  }
  for (; c < channels; ++c) {
    sum_terms_tile<T, 1, PERMUTE>(terms, n, c * stride, stride, shift, out0 + c * out_stride, second(), out_stride, add);
  }
}

// Two (or one) adjacent rows of queries of a class and the rows of keys that they attend.
struct RowPair {
  template <class T>
  RowPair(const ClassGeometry<T>& g, int64_t y, int64_t end)
      : y(y), count(std::min<int64_t>(2, end - y)), kernel(g.ky), start{g.start_y(y), g.start_y(y + count - 1)} {}
  bool attends(int r, int64_t key) const { return r < count && start[r] <= key && key < start[r] + kernel; }
  int64_t first() const { return start[0]; }
  int64_t last() const { return start[1] + kernel; }  // one past

  int64_t y, count, kernel, start[2];
};

// Scores of one block of queries of a pair of rows, [ky * kx][lanes] per row: (+)= query . key.
template <class T>
void score_block(const ClassGeometry<T>& g, const RowPair& pair, const QueryBlock<T>& block, int64_t x,
                 const RowRing<T>& query, const RowRing<T>& key, int64_t channels, T* const* out, bool add) {
  constexpr int L = kLanes<T>;
  for (int64_t row = pair.first(); row < pair.last(); ++row) {
    const T* q[2];
    T* target[2];
    int n = 0;
    for (int r = 0; r < pair.count; ++r) {
      if (!pair.attends(r, row)) continue;
      q[n] = query.row(pair.y + r) + x;
      target[n++] = out[r] + (row - pair.start[r]) * g.kx * L;
    }
    const T* k = key.row(row) + block.start;
    const auto run = [&](auto rows, auto permuted) {
      score_row<T, decltype(rows)::value, decltype(permuted)::value>(q, k, key.stride(), channels, block.shift, g.kx,
                                                                     target, add);
    };
    using One = std::integral_constant<int, 1>;
    using Two = std::integral_constant<int, 2>;
    if (n == 2) block.regular ? run(Two{}, std::false_type{}) : run(Two{}, std::true_type{});
    else block.regular ? run(One{}, std::false_type{}) : run(One{}, std::true_type{});
  }
}

// Sums over the window, for one block of queries of a pair of rows: out[r][c] (+)= sum of weight[r] * value.
template <class T>
void gather_keys(const ClassGeometry<T>& g, const RowPair& pair, const QueryBlock<T>& block, const T* const* weight,
                 const RowRing<T>& value, int64_t channels, std::vector<Term<T>>& terms, T* const* out, bool add) {
  constexpr int L = kLanes<T>;
  terms.clear();
  for (int64_t row = pair.first(); row < pair.last(); ++row) {
    Term<T> term{value.row(row) + block.start, {nullptr, nullptr}, L, g.kx};
    for (int r = 0; r < pair.count; ++r) {
      if (pair.attends(r, row)) term.a[r] = weight[r] + (row - pair.start[r]) * g.kx * L;
    }
    terms.push_back(term);
  }
  T* second = pair.count == 2 ? out[1] : nullptr;
  if (block.regular) {
    sum_terms<T, false>(terms.data(), terms.size(), channels, value.stride(), block.shift, out[0], second, L, add);
  } else {
    sum_terms<T, true>(terms.data(), terms.size(), channels, value.stride(), block.shift, out[0], second, L, add);
  }
}

// Adds a pair's contributions to rows of key gradients [begin, end): row[key][c][x] += sum over the queries that
// attend a key of weight * query. `weight[r]` is the pair's row of weights, [ky][weights_stride].
template <class T>
class QueryGatherer {
 public:
  void run(const ClassGeometry<T>& g, const RowPair& pair, const T* const* weight, const RowRing<T>& query,
           int64_t channels, const RowRing<T>& gradient, int64_t begin, int64_t end) {
    constexpr int L = kLanes<T>;
    begin = std::max(begin, pair.first());
    end = std::min(end, pair.last());
    for (int64_t key = begin; key < end; key += 2) {
      const int64_t rows = std::min<int64_t>(2, end - key);
      for (int64_t b = 0; b < static_cast<int64_t>(g.key_blocks.size()); ++b) {
        const KeyBlock& block = g.key_blocks[b];
        const int64_t x = b * L;
        if (static_cast<int64_t>(staged_.size()) < 4 * block.count * L) staged_.resize(4 * block.count * L);
        Term<T> terms[2];
        for (int r = 0; r < pair.count; ++r) {
          terms[r] = {query.row(pair.y + r) + x + block.first, {nullptr, nullptr}, 0, block.count};
          for (int64_t i = 0; i < rows; ++i) {
            if (!pair.attends(r, key + i)) continue;
            const T* weights = weight[r] + (key + i - pair.start[r]) * g.weights_stride;
            if (block.regular) {
              // Farther queries see the key at a smaller j.
              terms[r].a[i] = weights + (g.kx / 2 - block.first) * g.padded + x + block.first;
              terms[r].a_stride = 1 - g.padded;
            } else {
              T* staged = staged_.data() + (2 * r + i) * block.count * L;
              const int32_t* position = g.positions.data() + block.index;
              for (int64_t m = 0; m < block.count * L; ++m) staged[m] = weights[position[m]];
              terms[r].a[i] = staged;
              terms[r].a_stride = L;
            }
          }
        }
        sum_terms<T, false>(terms, pair.count, channels, query.stride(), Integers<T>{}, gradient.row(key) + x,
                            rows == 2 ? gradient.row(key + 1) + x : nullptr, gradient.stride(), true);
      }
    }
  }

 private:
  std::vector<T> staged_;
};

}  // namespace natten_ext::NATTEN_EXT_ISA
