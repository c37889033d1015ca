// The one matrix product of the dense kernels: C[m][n] (+)= sum over k of A(m, k) B[k][n], on blocks in cache.
//
// A is read one value at a time with any two strides, so that a transposed operand costs nothing; B and C are
// rows of whole vectors (n is a multiple of the lanes; padding columns may hold anything).
#pragma once

#include <bit>

#include "simd.h"

namespace natten_ext::NATTEN_EXT_ISA {

template <class T>
struct Strided {  // A(m, k) = data[m * row + k * column]
  const T* data;
  int64_t row, column;
};

// One register tile of ROWS x VECTORS accumulators.
template <class T, int ROWS, int VECTORS>
NATTEN_EXT_INLINE void gemm_tile(
    int64_t depth, Strided<T> a, const T* NATTEN_EXT_RESTRICT b, int64_t ldb, T* c, int64_t ldc, bool add) {
  constexpr int L = kLanes<T>;
  Vector<T> sum[ROWS][VECTORS];
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) sum[r][v] = Vector<T>{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vector<T> row[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) row[v] = load(b + k * ldb + v * L);
    const T* column = a.data + k * a.column;
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      const Vector<T> value = broadcast<T>(column[r * a.row]);
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sum[r][v] += value * row[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) {
      T* target = c + r * ldc + v * L;
      store(target, add ? load(target) + sum[r][v] : sum[r][v]);
    }
  }
}

// All rows of one column panel; the last rows take lower tiles.
template <class T, int ROWS, int VECTORS>
NATTEN_EXT_INLINE void gemm_panel(
    int64_t m, int64_t depth, Strided<T> a, const T* b, int64_t ldb, T* c, int64_t ldc, bool add) {
  int64_t r = 0;
  for (; r + ROWS <= m; r += ROWS) {
    gemm_tile<T, ROWS, VECTORS>(depth, {a.data + r * a.row, a.row, a.column}, b, ldb, c + r * ldc, ldc, add);
  }
  if constexpr (ROWS > 1) {
    if (r < m) {
      constexpr int fewer = std::bit_floor(static_cast<unsigned>(ROWS - 1));
      gemm_panel<T, fewer, VECTORS>(m - r, depth, {a.data + r * a.row, a.row, a.column}, b, ldb, c + r * ldc, ldc, add);
    }
  }
}

template <class T>
void gemm(int64_t m, int64_t n, int64_t depth, Strided<T> a, const T* b, int64_t ldb, T* c, int64_t ldc, bool add) {
  constexpr int L = kLanes<T>;
  // Tiles that fill 16 registers, or 32 with AVX-512.
  constexpr int wide = NATTEN_EXT_VECTOR_BYTES == 64 ? 2 : 1;
  int64_t vectors = n / L;
  while (vectors > 0) {
    if (vectors == 3 || vectors > 4) {
      gemm_panel<T, 4 * wide, 3>(m, depth, a, b, ldb, c, ldc, add);
      vectors -= 3, b += 3 * L, c += 3 * L;
    } else if (vectors >= 2) {
      gemm_panel<T, 6 * wide, 2>(m, depth, a, b, ldb, c, ldc, add);
      vectors -= 2, b += 2 * L, c += 2 * L;
    } else {
      gemm_panel<T, 8 * wide, 1>(m, depth, a, b, ldb, c, ldc, add);
      vectors -= 1, b += L, c += L;
    }
  }
}

}  // namespace natten_ext::NATTEN_EXT_ISA
