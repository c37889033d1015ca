// Moving rows of channels between tensors of any dtype and blocks of the compute type.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "../problem.h"
#include "cost.h"
#include "half.h"
#include "kernels.h"
#include "working_memory.h"

namespace natten_ext::NATTEN_EXT_ISA {

// One value of a table, which may have another dtype than the maps, at an element offset.
template <class T>
T load_value(const View& view, int64_t offset) {
  switch (view.dtype) {
    case DType::float32: return static_cast<T>(static_cast<const float*>(view.data)[offset]);
    case DType::float64: return static_cast<T>(static_cast<const double*>(view.data)[offset]);
    case DType::bfloat16: return static_cast<T>(widen(static_cast<const BFloat16*>(view.data)[offset]));
    default: return static_cast<T>(widen(static_cast<const Float16*>(view.data)[offset]));
  }
}
template <class T>
void store_value(const View& view, int64_t offset, T value) {
  switch (view.dtype) {
    case DType::float32: static_cast<float*>(view.data)[offset] = static_cast<float>(value); break;
    case DType::float64: static_cast<double*>(view.data)[offset] = static_cast<double>(value); break;
    case DType::bfloat16: narrow(static_cast<float>(value), static_cast<BFloat16*>(view.data) + offset); break;
    default: narrow(static_cast<float>(value), static_cast<Float16*>(view.data) + offset);
  }
}

// Calls visit(pointer to a map's numbers at an element offset), typed as they are: the compute type, or halves where
// that is float.
template <class T, class Visit>
NATTEN_EXT_INLINE void visit_numbers(const View& view, int64_t offset, const Visit& visit) {
  if constexpr (sizeof(T) == 4) {
    if (view.dtype == DType::bfloat16) return visit(static_cast<BFloat16*>(view.data) + offset);
    if (view.dtype == DType::float16) return visit(static_cast<Float16*>(view.data) + offset);
  }
  visit(static_cast<T*>(view.data) + offset);
}

// n channels from an element offset, less `origin` (none if null), times `factor`.
// Rows are short, so these are loops over vectors rather than calls of memcpy; the last vector may overlap the one before.
template <class T>
NATTEN_EXT_INLINE void load_row(T* NATTEN_EXT_RESTRICT row, const View& view, int64_t offset, int64_t n, T factor,
                                const T* origin = nullptr) {
  constexpr int L = kLanes<T>;
  visit_numbers<T>(view, offset, [&](const auto* from) __attribute__((always_inline)) {
    const auto value = [&](int64_t c) __attribute__((always_inline)) {
      return (origin != nullptr ? load_wide(from + c) - load(origin + c) : load_wide(from + c)) * factor;
    };
    for (int64_t c = 0; c + L <= n; c += L) store(row + c, value(c));
    if (n % L == 0) return;
    if (n > L) return store(row + n - L, value(n - L));
    const Vector<T> first = load_first(from, n);
    store_first(row, (origin != nullptr ? first - load_first(origin, n) : first) * factor, n);
  });
}
template <class T>
NATTEN_EXT_INLINE void store_row(const T* NATTEN_EXT_RESTRICT row, const View& view, int64_t offset, int64_t n, T factor) {
  constexpr int L = kLanes<T>;
  visit_numbers<T>(view, offset, [&](auto* to) __attribute__((always_inline)) {
    for (int64_t c = 0; c + L <= n; c += L) store_narrow(to + c, load(row + c) * factor);
    if (n % L == 0) return;
    if (n > L) return store_narrow(to + n - L, load(row + n - L) * factor);
    store_first(to, load_first(row, n) * factor, n);
  });
}

// Squares of larger numbers overflow, or nearly: they are treated with the care that infinity needs.
template <class T>
constexpr T kLarge = sizeof(T) == 4 ? T(1e18) : T(1e150);

// Adds zero to each lane of `strange` for n channels from an element offset, or NaN for what is not of a size below kLarge.
template <class T>
NATTEN_EXT_INLINE void look_for_large(Vector<T>& strange, const View& view, int64_t offset, int64_t n) {
  constexpr int L = kLanes<T>;
  constexpr T kToOverflow = std::numeric_limits<T>::max() / kLarge<T>;
  visit_numbers<T>(view, offset, [&](const auto* from) __attribute__((always_inline)) {
    int64_t c = 0;
    for (; c + L <= n; c += L) strange += load_wide(from + c) * kToOverflow * T(0);
    if (c < n) strange += load_first(from + c, n - c) * kToOverflow * T(0);
  });
}

// Asks for channels that will be loaded soon: rows of a tensor are too far apart for the hardware to guess.
template <class T>
NATTEN_EXT_INLINE void prefetch_row(const T* row, int64_t n) {
  __builtin_prefetch(row);
  if (n * static_cast<int64_t>(sizeof(T)) > 64) __builtin_prefetch(row + 64 / sizeof(T));
}

// target[column][row] = source[row][column]; rows and columns are multiples of the lanes.
template <class T>
void transpose(T* target, int64_t target_stride, const T* source, int64_t source_stride, int64_t rows, int64_t columns) {
  constexpr int L = kLanes<T>;
  for (int64_t r = 0; r < rows; r += L) {
    for (int64_t c = 0; c < columns; c += L) {
      Vector<T> square[L];
      load_transposed<T>(source + r * source_stride + c, source_stride, square);
      for (int i = 0; i < L; ++i) store(target + (c + i) * target_stride + r, square[i]);
    }
  }
}

// Partial tables of heads that share a key head, of one part: so far apart.
template <class T>
struct PartialTables {
  T* first = nullptr;
  int64_t stride = 0;
  T* table(int64_t member) const { return first + member * stride; }
};

// Fixed-order sum of partial tables [head][part][z][y][x], so that the result does not depend on the threads.
template <class T>
void reduce_tables(const T* partial, int64_t parts, const View& table, HeadRange heads, const Problem& p) {
  const int64_t height = p.table_height(), width = p.table_width(), size = p.table_size();
  for (int64_t head = heads.first; head < heads.last; ++head, partial += parts * size) {
    for (int64_t i = 0; i < size; ++i) {
      T sum = 0;
      for (int64_t part = 0; part < parts; ++part) sum += partial[part * size + i];
      const int64_t z = i / width / height, y = i / width % height, x = i % width;
      store_value(table, head * table.head + z * table.z + y * table.y + x * table.x, sum);
    }
  }
}

template <class T>
constexpr T kLog2E = static_cast<T>(1.44269504088896340735992468100189214);
template <class T>
constexpr T kLn2 = static_cast<T>(0.693147180559945309417232121458176568);

// A value of a table as a score in units of log2. It saturates: the largest numbers, with which tables mask or choose,
// stay finite, and so do their sums with other scores and the differences of those. Infinities stay what they are.
template <class T>
T table_score(T value) {
  constexpr T kLargest = std::numeric_limits<T>::max() / 2;
  return std::isinf(value) ? value : std::clamp(value * kLog2E<T>, -kLargest, kLargest);
}

// Runs body(worker, index) for every index, with one Worker (working memory) per thread, made by make(). `nanoseconds`, of
// one thread for all, says how many threads are worth their start.
template <class Make, class Body>
void for_each_task(int64_t count, const Make& make, const Body& body, double nanoseconds = kUnknown) {
  struct Context {
    const Make& make;
    const Body& body;
  } context{make, body};
  parallel_tasks(
      count, worthwhile_threads(nanoseconds, thread_count()),
      [](void* opaque, int64_t (*next)(void*), void* queue) {
        const Context& c = *static_cast<Context*>(opaque);
        int64_t index = next(queue);
        if (index < 0) return;
        auto worker = c.make();
        for (; index >= 0; index = next(queue)) c.body(worker, index);
      },
      &context);
}

}  // namespace natten_ext::NATTEN_EXT_ISA
