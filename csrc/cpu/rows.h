// Moving rows of channels between tensors of any dtype and blocks of the compute type.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "simd.h"
#include "working_memory.h"

namespace natten_ext::NATTEN_EXT_ISA {

inline float bfloat16_to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

inline uint16_t float_to_bfloat16(float value) {  // to nearest, ties to even; NaN stays NaN
  uint32_t wide;
  std::memcpy(&wide, &value, sizeof wide);
  if ((wide & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return static_cast<uint16_t>((wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16);
}

// One value of a tensor at an element offset.
template <class T>
T load_value(const View& view, int64_t offset) {
  switch (view.dtype) {
    case DType::float32: return static_cast<T>(static_cast<const float*>(view.data)[offset]);
    case DType::float64: return static_cast<T>(static_cast<const double*>(view.data)[offset]);
    default: return static_cast<T>(bfloat16_to_float(static_cast<const uint16_t*>(view.data)[offset]));
  }
}
template <class T>
void store_value(const View& view, int64_t offset, T value) {
  switch (view.dtype) {
    case DType::float32: static_cast<float*>(view.data)[offset] = static_cast<float>(value); break;
    case DType::float64: static_cast<double*>(view.data)[offset] = static_cast<double>(value); break;
    default: static_cast<uint16_t*>(view.data)[offset] = float_to_bfloat16(static_cast<float>(value));
  }
}

// n channels from an element offset, times `factor`. The compute type is float, or double for float64 tensors.
// Rows are short, so these are loops over vectors rather than calls of memcpy.
template <class T>
NATTEN_EXT_INLINE void load_row(T* NATTEN_EXT_RESTRICT row, const View& view, int64_t offset, int64_t n, T factor) {
  constexpr int L = kLanes<T>;
  int64_t c = 0;
  if (view.dtype == DType::bfloat16) {
    const uint16_t* source = static_cast<const uint16_t*>(view.data) + offset;
    for (; c < n; ++c) row[c] = bfloat16_to_float(source[c]) * factor;
  } else {
    const T* source = static_cast<const T*>(view.data) + offset;
    for (; c + L <= n; c += L) store(row + c, load(source + c) * factor);
    for (; c < n; ++c) row[c] = source[c] * factor;
  }
}
template <class T>
NATTEN_EXT_INLINE void store_row(const T* NATTEN_EXT_RESTRICT row, const View& view, int64_t offset, int64_t n, T factor) {
  constexpr int L = kLanes<T>;
  int64_t c = 0;
  if (view.dtype == DType::bfloat16) {
    uint16_t* target = static_cast<uint16_t*>(view.data) + offset;
    for (; c < n; ++c) target[c] = float_to_bfloat16(static_cast<float>(row[c] * factor));
  } else {
    T* target = static_cast<T*>(view.data) + offset;
    for (; c + L <= n; c += L) store(target + c, load(row + c) * factor);
    for (; c < n; ++c) target[c] = row[c] * factor;
  }
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
      for (int i = 0; i < L; ++i) square[i] = load(source + (r + i) * source_stride + c);
      transpose_square<T>(square);
      for (int i = 0; i < L; ++i) store(target + (c + i) * target_stride + r, square[i]);
    }
  }
}

// Fixed-order sum of partial tables [head][part][y][x], so that the result does not depend on the threads.
template <class T>
void reduce_tables(const T* partial, int64_t parts, const View& table, HeadRange heads, int64_t height, int64_t width) {
  const int64_t size = height * width;
  for (int64_t head = heads.first; head < heads.last; ++head, partial += parts * size) {
    for (int64_t i = 0; i < size; ++i) {
      T sum = 0;
      for (int64_t part = 0; part < parts; ++part) sum += partial[part * size + i];
      store_value(table, head * table.head + i / width * table.y + i % width * table.x, sum);
    }
  }
}

template <class T>
constexpr T kLog2E = static_cast<T>(1.44269504088896340735992468100189214);
template <class T>
constexpr T kLn2 = static_cast<T>(0.693147180559945309417232121458176568);

// Runs body(worker, index) for every index, with one Worker (working memory) per thread, made by make().
template <class Make, class Body>
void for_each_task(int64_t count, const Make& make, const Body& body) {
  struct Context {
    const Make& make;
    const Body& body;
  } context{make, body};
  parallel_tasks(
      count,
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
