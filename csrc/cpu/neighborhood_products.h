// The products of the neighborhood kernels: scores of a strip of queries, and sums over its keys.
#pragma once

#include <type_traits>
#include <vector>

#include "neighborhood_rows.h"

namespace natten_ext::NATTEN_EXT_ISA {

template <int N>
using Int = std::integral_constant<int, N>;

// Ways to read key j of a block's windows, whose key 0 is at p; see Reading.
template <class T>
struct Straight {
  static constexpr bool kPlain = true;  // takes no registers
  Straight() = default;
  explicit Straight(const QueryBlock<T>&) {}
  NATTEN_EXT_INLINE Vector<T> operator()(const T* p, int64_t j) const { return load(p + j); }
};
template <class T>
struct Interleaved {
  static constexpr bool kPlain = true;
  Interleaved() = default;
  explicit Interleaved(const QueryBlock<T>&) {}
  NATTEN_EXT_INLINE Vector<T> operator()(const T* p, int64_t j) const { return load(p + j * kLanes<T>); }
};
template <class T>
struct Permuted {
  static constexpr bool kPlain = false;
  explicit Permuted(const QueryBlock<T>& block) : shift_(block.shift) {}
  NATTEN_EXT_INLINE Vector<T> operator()(const T* p, int64_t j) const { return permute<T>(load(p + j), shift_); }

 private:
  const Integers<T> shift_;
};
template <class T>
struct Split {
  static constexpr bool kPlain = false;
  explicit Split(const QueryBlock<T>& block) : shift_(block.shift), second_(block.second), jump_(block.jump) {}
  NATTEN_EXT_INLINE Vector<T> operator()(const T* p, int64_t j) const {
    const Integers<T> first = (Integers<T>)permute<T>(load(p + j), shift_);
    const Integers<T> second = (Integers<T>)permute<T>(load(p + j + jump_), shift_);
    return (Vector<T>)((first & ~second_) | (second & second_));
  }

 private:
  const Integers<T> shift_, second_;
  const int64_t jump_;
};
template <class T>
struct Masked {
  static constexpr bool kPlain = false;
  explicit Masked(const QueryBlock<T>& block) : seen_(block.seen) {}
  NATTEN_EXT_INLINE Vector<T> operator()(const T* p, int64_t j) const {
    return (Vector<T>)((Integers<T>)load(p + j) & (Integers<T>)load(seen_ + j * kLanes<T>));
  }

 private:
  const T* const seen_;
};

// Calls run(reader) with the block's.
template <class T, class Run>
NATTEN_EXT_INLINE auto with_reader(const QueryBlock<T>& block, const Run& run) {
  switch (block.reading) {
    case Reading::straight: return run(Straight<T>(block));
    case Reading::permuted: return run(Permuted<T>(block));
    case Reading::split: return run(Split<T>(block));
    case Reading::interleaved: return run(Interleaved<T>(block));
    default: return run(Masked<T>(block));
  }
}

// out[r][j] = sum over channels of query[r][c] * key[c][j], plus start[r][j] if there is a `start`, for KEYS adjacent keys
// of one row, from key `first` on. In this order a large value of a table costs the products no digits until the end.
template <class T, int ROWS, int KEYS, class Read>
NATTEN_EXT_INLINE void score_tile(const T* const* query, const T* key, int64_t first, int64_t stride, int64_t channels,
                                  const Read read, const T* const* start, T* const* out) {
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
      const Vector<T> k = kept(read(key + c * stride, first + j));
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
template <class T, int ROWS, class Read>
void score_row(const T* const* query, const T* key, int64_t stride, int64_t channels, const Read read, int64_t kx,
               const T* const* start, T* const* out) {
  constexpr int L = kLanes<T>;
  // Accumulators for 16 registers, of which a permutation takes two.
  constexpr int kLimit = ROWS == 1 || kRegisters == 32 ? 7 : ROWS == 3 && !Read::kPlain ? 3 : 4;
  const int64_t tile = even_block(kx, kLimit);
  T* target[ROWS];
  const T* from[ROWS];
  for (int64_t j = 0; j < kx; j += tile) {
    for (int r = 0; r < ROWS; ++r) {
      target[r] = out[r] + j * L;
      if (start != nullptr) from[r] = start[r] + j * L;
    }
    const auto run = [&](auto keys) {
      score_tile<T, ROWS, decltype(keys)::value>(query, key, j, stride, channels, read, start != nullptr ? from : nullptr,
                                                 target);
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
template <class T, int CHANNELS, int COUNT, int FIRST, int LAST, class Read>
NATTEN_EXT_INLINE void sum_term(const Term<T>& term, const T* b, int64_t stride, const Read read,
                                Vector<T> (&sum)[kGroup][CHANNELS]) {
  const int64_t a_stride = COUNT > 0 ? kLanes<T> : term.a_stride;
  const T* column[CHANNELS];
#pragma GCC unroll 8
  for (int c = 0; c < CHANNELS; ++c) column[c] = kept(b + c * stride);
  const auto products = [&](int64_t m) __attribute__((always_inline)) {
    Vector<T> weight[kGroup];
#pragma GCC unroll 4
    for (int r = FIRST; r < LAST; ++r) weight[r] = load(term.a[r] + m * a_stride);
#pragma GCC unroll 8
    for (int c = 0; c < CHANNELS; ++c) {
      const Vector<T> value = kept(read(column[c], m));
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

template <class T, int CHANNELS, int COUNT, class Read>
NATTEN_EXT_INLINE void sum_terms_tile(const Term<T>* terms, int64_t n, int64_t b_offset, int64_t stride, const Read read,
                                      T* const* out, int rows, int64_t out_offset, int64_t out_stride, bool add) {
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
      case 1: sum_term<T, CHANNELS, COUNT, 0, 1>(term, b, stride, read, sum); break;
      case 2: sum_term<T, CHANNELS, COUNT, 0, 2>(term, b, stride, read, sum); break;
      case 3: sum_term<T, CHANNELS, COUNT, 0, 3>(term, b, stride, read, sum); break;
      case 6: sum_term<T, CHANNELS, COUNT, 1, 2>(term, b, stride, read, sum); break;
      case 7: sum_term<T, CHANNELS, COUNT, 1, 3>(term, b, stride, read, sum); break;
      case 11: sum_term<T, CHANNELS, COUNT, 2, 3>(term, b, stride, read, sum); break;
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
template <class T, int COUNT, class Read>
int64_t sum_terms(const Term<T>* terms, int64_t n, int64_t c, int64_t channels, int64_t stride, const Read read,
                  T* const* out, int rows, int64_t out_stride, bool add) {
  constexpr int kWide = kRegisters == 32 ? 8 : Read::kPlain ? 4 : 3;  // a permutation takes two registers
  const int64_t from = c * stride, to = c * out_stride;
  if (c + kWide <= channels) {
    sum_terms_tile<T, kWide, COUNT>(terms, n, from, stride, read, out, rows, to, out_stride, add);
    return c + kWide;
  }
  if (kWide > 4 && c + 4 <= channels) {
    sum_terms_tile<T, 4, COUNT>(terms, n, from, stride, read, out, rows, to, out_stride, add);
    return c + 4;
  }
  if (c + 2 <= channels) {
    sum_terms_tile<T, 2, COUNT>(terms, n, from, stride, read, out, rows, to, out_stride, add);
    return c + 2;
  }
  sum_terms_tile<T, 1, COUNT>(terms, n, from, stride, read, out, rows, to, out_stride, add);
  return c + 1;
}

// Working memory for the weights of a strip: rows[r] is [block of the strip][row of keys][kx][lanes].
template <class T>
struct StripWeights {
  void resize(const ClassGeometry<T>& g) {
    block_size = g.key_rows * g.kx * kLanes<T>;
    for (int r = 0; r < std::min<int64_t>(kGroup, g.axis_y.length); ++r) {
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
  for_each_key_row(group, [&](Row row) {
    const int first = group.first_attending(row.y), n = group.last_attending(row.y) - first;
    for (int64_t b = begin; b < end; ++b) {
      const QueryBlock<T>& block = g.query_blocks[b];
      const T* q[kGroup];
      T* target[kGroup];
      const T* from[kGroup];
      for (int i = 0; i < n; ++i) {
        const Row own = group.row(first + i);
        q[i] = query.row(own) + b * L;
        target[i] = out.block(first + i, b - begin) + group.place(first + i, row) * g.kx * L;
        from[i] = table != nullptr ? table->row(block.table, {row.z - own.z, row.y - own.y}) : target[i];
      }
      const T* const* start = add || table != nullptr ? from : nullptr;
      const T* k = key.row(row) + block.start;
      with_reader(block, [&](auto read) {
        const auto run = [&](auto rows) {
          score_row<T, decltype(rows)::value>(q, k, key.stride(), channels, read, g.kx, start, target);
        };
        if (n == 3) run(Int<3>{});
        else if (n == 2) run(Int<2>{});
        else run(Int<1>{});
      });
    }
  });
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
  const int64_t rows = (group.planes.end - group.planes.start) * (group.last() - group.first());
  terms.resize((end - begin) * rows);
  for (int64_t b = begin; b < end; ++b) {
    Term<T>* next = terms.data() + (b - begin) * rows;
    for_each_key_row(group, [&](Row row) {
      Term<T>& term = *next++;
      const int first = group.first_attending(row.y), last = group.last_attending(row.y);
      term = {value.row(row) + g.query_blocks[b].start, {}, first, last, L, g.kx};
      for (int r = first; r < last; ++r) term.a[r] = weights.block(r, b - begin) + group.place(r, row) * g.kx * L;
    });
  }
  for (int64_t b = begin; b < end; ++b) {
    const QueryBlock<T>& block = g.query_blocks[b];
    const Term<T>* from = terms.data() + (b - begin) * rows;
    T* target[kGroup];
    for (int r = 0; r < kGroup; ++r) target[r] = out.row(b - begin, r);
    with_reader(block, [&](auto read) {
      const auto run = [&](auto count) {
        for (int64_t c = 0; c < channels;) {
          c = sum_terms<T, decltype(count)::value>(from, rows, c, channels, value.stride(), read, target, group.count, L, add);
        }
      };
      // The kernel size of StyleNAT and most others gets loops of its own.
      g.kx == 7 ? run(Int<7>{}) : run(Int<0>{});
    });
  }
}

}  // namespace natten_ext::NATTEN_EXT_ISA
