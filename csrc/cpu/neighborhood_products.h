// The products of the neighborhood kernels: scores of a strip of queries, sums over its keys, and sums over the
// queries that attend a key.
#pragma once

#include <type_traits>
#include <vector>

#include "neighborhood_rows.h"

namespace natten_ext::NATTEN_EXT_ISA {

template <int N>
using Int = std::integral_constant<int, N>;

template <class T, bool PERMUTE>
NATTEN_EXT_INLINE Vector<T> load_shifted(const T* p, Integers<T> shift) {
  const Vector<T> v = load(p);
  if constexpr (PERMUTE) return permute<T>(v, shift);
  else return v;
}

// out[r][j] = sum over channels of query[r][c] * key[c][j], plus start[r][j] if there is a `start`, for KEYS adjacent keys
// of one row. In this order a large value of a table costs the products no digits until the end.
template <class T, int ROWS, int KEYS, bool PERMUTE>
NATTEN_EXT_INLINE void score_tile(const T* const* query, const T* key, int64_t stride, int64_t channels,
                                  Integers<T> shift, const T* const* start, T* const* out) {
  constexpr int L = kLanes<T>;
  Vector<T> sum[ROWS][KEYS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < KEYS; ++j) sum[r][j] = Vector<T>{};
  }
#pragma GCC unroll 2
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
    for (int j = 0; j < KEYS; ++j) {
      store(out[r] + j * L, start != nullptr ? sum[r][j] + load(start[r] + j * L) : sum[r][j]);
    }
  }
}

// One row of keys for ROWS rows of queries.
template <class T, int ROWS, bool PERMUTE>
void score_row(const T* const* query, const T* key, int64_t stride, int64_t channels, Integers<T> shift, int64_t kx,
               const T* const* start, T* const* out) {
  constexpr int L = kLanes<T>;
  // Accumulators for 16 registers; a permutation takes two of them.
  constexpr int kLimit = ROWS == 1 ? 7 : ROWS == 3 && PERMUTE ? 3 : 4;
  const int64_t tile = even_block(kx, kLimit);
  T* target[ROWS];
  const T* from[ROWS];
  for (int64_t j = 0; j < kx; j += tile) {
    for (int r = 0; r < ROWS; ++r) {
      target[r] = out[r] + j * L;
      if (start != nullptr) from[r] = start[r] + j * L;
    }
    const auto run = [&](auto keys) {
      score_tile<T, ROWS, decltype(keys)::value, PERMUTE>(
          query, key + j, stride, channels, shift, start != nullptr ? from : nullptr, target);
    };
    switch (std::min(tile, kx - j)) {
      case 1: run(Int<1>{}); break;
      case 2: run(Int<2>{}); break;
      case 3: run(Int<3>{}); break;
      case 4: run(Int<std::min(4, kLimit)>{}); break;
      case 5: run(Int<std::min(5, kLimit)>{}); break;
      case 6: run(Int<std::min(6, kLimit)>{}); break;
      default: run(Int<kLimit>{});
    }
  }
}

// A run of products that share one row of values b: for m < count and the output rows r with first <= r < last,
// out[r] += a[r][m * a_stride] * b[m].
template <class T>
struct Term {
  const T* b;
  const T* a[kGroup];
  int first, last;
  int64_t a_stride, count;
};

// COUNT is the number of products where it is known (and their weights then lie in whole vectors), otherwise 0.
template <class T, int CHANNELS, bool PERMUTE, int COUNT, int FIRST, int LAST>
NATTEN_EXT_INLINE void sum_term(const Term<T>& term, const T* b, int64_t stride, Integers<T> shift,
                                Vector<T> (&sum)[kGroup][CHANNELS]) {
  const int64_t a_stride = COUNT > 0 ? kLanes<T> : term.a_stride;
  const auto products = [&](int64_t m) __attribute__((always_inline)) {
    Vector<T> weight[kGroup];
#pragma GCC unroll 4
    for (int r = FIRST; r < LAST; ++r) weight[r] = load(term.a[r] + m * a_stride);
#pragma GCC unroll 8
    for (int c = 0; c < CHANNELS; ++c) {
      const Vector<T> value = load_shifted<T, PERMUTE>(b + c * stride + m, shift);
#pragma GCC unroll 4
      for (int r = FIRST; r < LAST; ++r) sum[r][c] += weight[r] * value;
    }
  };
  if constexpr (COUNT > 0) {
#pragma GCC unroll 8
    for (int64_t m = 0; m < COUNT; ++m) products(m);
  } else {
    for (int64_t m = 0; m < term.count; ++m) products(m);
  }
}

template <class T, int CHANNELS, bool PERMUTE, int COUNT>
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
      case 1: sum_term<T, CHANNELS, PERMUTE, COUNT, 0, 1>(term, b, stride, shift, sum); break;
      case 2: sum_term<T, CHANNELS, PERMUTE, COUNT, 0, 2>(term, b, stride, shift, sum); break;
      case 3: sum_term<T, CHANNELS, PERMUTE, COUNT, 0, 3>(term, b, stride, shift, sum); break;
      case 6: sum_term<T, CHANNELS, PERMUTE, COUNT, 1, 2>(term, b, stride, shift, sum); break;
      case 7: sum_term<T, CHANNELS, PERMUTE, COUNT, 1, 3>(term, b, stride, shift, sum); break;
      case 11: sum_term<T, CHANNELS, PERMUTE, COUNT, 2, 3>(term, b, stride, shift, sum); break;
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
template <class T, bool PERMUTE, int COUNT>
int64_t sum_terms(const Term<T>* terms, int64_t n, int64_t c, int64_t channels, int64_t stride, Integers<T> shift,
                  T* const* out, int rows, int64_t out_stride, bool add) {
  constexpr int kWide = PERMUTE ? 3 : 4;  // a permutation takes two registers
  const int64_t from = c * stride, to = c * out_stride;
  if (c + kWide <= channels) {
    sum_terms_tile<T, kWide, PERMUTE, COUNT>(terms, n, from, stride, shift, out, rows, to, out_stride, add);
    return c + kWide;
  }
  if (c + 2 <= channels) {
    sum_terms_tile<T, 2, PERMUTE, COUNT>(terms, n, from, stride, shift, out, rows, to, out_stride, add);
    return c + 2;
  }
  sum_terms_tile<T, 1, PERMUTE, COUNT>(terms, n, from, stride, shift, out, rows, to, out_stride, add);
  return c + 1;
}

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

// Scores of the blocks [begin, end) of a group of rows: query . key, plus what `out` holds if `add`, or plus a table.
template <class T>
void score_strip(const ClassGeometry<T>& g, const RowGroup& group, int64_t begin, int64_t end, const RowRing<T>& query,
                 const RowRing<T>& key, int64_t channels, const StripWeights<T>& out, bool add,
                 const ExpandedTable<T>* table = nullptr) {
  constexpr int L = kLanes<T>;
  for (int64_t row = group.first(); row < group.last(); ++row) {
    const int first = group.first_attending(row), n = group.last_attending(row) - first;
    for (int64_t b = begin; b < end; ++b) {
      const QueryBlock<T>& block = g.query_blocks[b];
      const T* q[kGroup];
      T* target[kGroup];
      const T* from[kGroup];
      for (int i = 0; i < n; ++i) {
        const int64_t y = group.y + first + i;
        q[i] = query.row(y) + b * L;
        target[i] = out.block(first + i, b - begin) + (row - group.start[first + i]) * g.kx * L;
        from[i] = table != nullptr ? table->row(block.table, row - y) : target[i];
      }
      const T* const* start = add || table != nullptr ? from : nullptr;
      const T* k = key.row(row) + block.start;
      const auto run = [&](auto rows, auto permuted) {
        score_row<T, decltype(rows)::value, decltype(permuted)::value>(q, k, key.stride(), channels, block.shift, g.kx,
                                                                       start, target);
      };
      const auto run_rows = [&](auto rows) { block.regular ? run(rows, std::false_type{}) : run(rows, std::true_type{}); };
      if (n == 3) run_rows(Int<3>{});
      else if (n == 2) run_rows(Int<2>{});
      else run_rows(Int<1>{});
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
  for (int64_t b = begin; b < end; ++b) {
    const QueryBlock<T>& block = g.query_blocks[b];
    const Term<T>* from = terms.data() + (b - begin) * rows;
    T* target[kGroup];
    for (int r = 0; r < kGroup; ++r) target[r] = out.row(b - begin, r);
    for (int64_t c = 0; c < channels;) {
      const auto run = [&](auto permuted, auto count) {
        return sum_terms<T, decltype(permuted)::value, decltype(count)::value>(
            from, rows, c, channels, value.stride(), block.shift, target, group.count, L, add);
      };
      // The kernel size of StyleNAT and most others gets loops of its own.
      if (g.kx == 7) c = block.regular ? run(std::false_type{}, Int<7>{}) : run(std::true_type{}, Int<7>{});
      else c = block.regular ? run(std::false_type{}, Int<0>{}) : run(std::true_type{}, Int<0>{});
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
// queries that attend a key of weight * query. Where borders make blocks irregular, other queries take part with a weight
// of zero; `strange` says that some may be NaN or infinite, so that they must not.
template <class T>
class QueryGatherer {
 public:
  void run(const ClassGeometry<T>& g, const RowGroup& group, const RowWeights<T>& weights, const RowRing<T>& query,
           int64_t channels, const RowRing<T>& gradient, int64_t begin, int64_t end, bool strange) {
    constexpr int L = kLanes<T>;
    begin = std::max(begin, group.first());
    end = std::min(end, group.last());
    for (int64_t key = begin; key < end; key += kGroup) {
      const int rows = static_cast<int>(std::min<int64_t>(kGroup, end - key));
      for (int64_t b = 0; b < static_cast<int64_t>(g.key_blocks.size()); ++b) {
        const KeyBlock& block = g.key_blocks[b];
        const int64_t x = b * L;
        if (strange && !block.regular) {
          one_by_one(g, group, weights, query, channels, gradient, key, rows, x, block);
          continue;
        }
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
          c = sum_terms<T, false, 0>(terms, group.count, c, channels, query.stride(), Integers<T>{}, target, rows,
                                  gradient.stride(), true);
        }
      }
    }
  }

 private:
  // The same for one block of keys of rows [key, key + rows), of the queries that attend each and no others.
  void one_by_one(const ClassGeometry<T>& g, const RowGroup& group, const RowWeights<T>& weights,
                  const RowRing<T>& query, int64_t channels, const RowRing<T>& gradient, int64_t key, int rows,
                  int64_t x, const KeyBlock& block) const {
    constexpr int L = kLanes<T>;
    const int32_t* positions = g.positions.data() + block.index;
    for (int64_t row = key; row < key + rows; ++row) {
      for (int64_t i = 0; i < channels * L; ++i) {
        const int64_t c = i / L, lane = i % L;
        T sum = 0;
        for (int r = 0; r < group.count; ++r) {
          if (!group.attends(r, row)) continue;
          const T* from = weights.rows[r] + (row - group.start[r]) * g.weights_stride;
          const T* queries = query.row(group.y + r) + c * query.stride() + x + block.first + lane;
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
