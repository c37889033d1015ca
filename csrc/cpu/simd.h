// Vectors of the instruction set that this file is compiled for, on the compiler's vector extensions.
//
// NATTEN_EXT_VECTOR_BYTES (16, 32 or 64) and NATTEN_EXT_ISA (the name of the namespace that keeps the variants
// of one kernel apart) come from the build, one pair per variant; see setup.py.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define NATTEN_EXT_INLINE inline __attribute__((always_inline))
#define NATTEN_EXT_RESTRICT __restrict__

namespace natten_ext::NATTEN_EXT_ISA {

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(NATTEN_EXT_VECTOR_BYTES)));
  typedef float unaligned __attribute__((vector_size(NATTEN_EXT_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t integer __attribute__((vector_size(NATTEN_EXT_VECTOR_BYTES)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(NATTEN_EXT_VECTOR_BYTES)));
  typedef double unaligned __attribute__((vector_size(NATTEN_EXT_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t integer __attribute__((vector_size(NATTEN_EXT_VECTOR_BYTES)));
};

template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
using Integers = typename VectorOf<T>::integer;

// Values per vector.
template <class T>
constexpr int kLanes = NATTEN_EXT_VECTOR_BYTES / sizeof(T);

template <class T>
constexpr int64_t round_up_to_lanes(int64_t n) {
  return (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

// The size of the fewest equal blocks of at most `limit` that n falls into.
constexpr int64_t even_block(int64_t n, int64_t limit) {
  const int64_t blocks = (n + limit - 1) / limit;
  return blocks == 0 ? 1 : (n + blocks - 1) / blocks;
}

template <class T>
NATTEN_EXT_INLINE Vector<T> load(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T>::unaligned*>(p);
}
template <class T>
NATTEN_EXT_INLINE void store(T* p, Vector<T> v) {
  *reinterpret_cast<typename VectorOf<T>::unaligned*>(p) = v;
}
template <class T>
NATTEN_EXT_INLINE Vector<T> broadcast(T value) {
  return value - Vector<T>{};
}

// The larger of two values; b if either is NaN.
template <class T>
NATTEN_EXT_INLINE Vector<T> maximum(Vector<T> a, Vector<T> b) {
#if NATTEN_EXT_VECTOR_BYTES == 64 && defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vector<T>)_mm512_max_ps((__m512)a, (__m512)b);
  else return (Vector<T>)_mm512_max_pd((__m512d)a, (__m512d)b);
#elif NATTEN_EXT_VECTOR_BYTES == 32 && defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return (Vector<T>)_mm256_max_ps((__m256)a, (__m256)b);
  else return (Vector<T>)_mm256_max_pd((__m256d)a, (__m256d)b);
#else
  return a > b ? a : b;
#endif
}

template <class T>
NATTEN_EXT_INLINE Vector<T> minimum(Vector<T> a, Vector<T> b) {
  return -maximum<T>(-a, -b);
}

template <class T>
NATTEN_EXT_INLINE T horizontal_sum(Vector<T> v) {
  // By halves: lane by lane each addition would wait for the one before.
  constexpr int L = kLanes<T>;
  T lanes[L];
  std::memcpy(lanes, &v, sizeof v);
  for (int half = L / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// result[lane] = v[index[lane]], 0 <= index < lanes.
template <class T>
NATTEN_EXT_INLINE Vector<T> permute(Vector<T> v, Integers<T> index) {
#if NATTEN_EXT_VECTOR_BYTES == 64 && defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vector<T>)_mm512_permutexvar_ps((__m512i)index, (__m512)v);
  else return (Vector<T>)_mm512_permutexvar_pd((__m512i)index, (__m512d)v);
#elif NATTEN_EXT_VECTOR_BYTES == 32 && defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    return (Vector<T>)_mm256_permutevar8x32_ps((__m256)v, (__m256i)index);
  } else {
    // Doubles move as pairs of 32-bit halves: indices 2i and 2i + 1.
    const __m256i twice = _mm256_slli_epi64((__m256i)index, 1);
    const __m256i halves = _mm256_or_si256(twice, _mm256_slli_epi64(_mm256_add_epi64(twice, _mm256_set1_epi64x(1)), 32));
    return (Vector<T>)_mm256_permutevar8x32_ps((__m256)v, halves);
  }
#else
  Vector<T> result{};
  for (int lane = 0; lane < kLanes<T>; ++lane) result[lane] = v[index[lane]];
  return result;
#endif
}

// 2^x to about one unit in the last place of normal numbers; exactly 0 far below them, so that what is masked vanishes.
// 2^x = 2^n 2^f with n the nearest integer; the polynomials fit 2^f on [-1/2, 1/2] (relative error 2e-9, 4e-20).
NATTEN_EXT_INLINE Vector<float> exp2(Vector<float> x) {
  x = maximum<float>(broadcast<float>(-127.0f), x);  // in this order NaN stays NaN
  const Vector<float> shifter = broadcast<float>(0x1.8p23f);  // brings n into the low bits
  const Vector<float> shifted = x + shifter;
  const Vector<float> f = x - (shifted - shifter);
  Vector<float> p = broadcast<float>(0.00015461444f);
  p = p * f + 0.00134004281f;
  p = p * f + 0.00961805667f;
  p = p * f + 0.05550327226f;
  p = p * f + 0.24022650922f;
  p = p * f + 0.69314720670f;
  p = p * f + 1.0f;
  return (Vector<float>)((Integers<float>)p + ((Integers<float>)shifted << 23));
}
NATTEN_EXT_INLINE Vector<double> exp2(Vector<double> x) {
  x = maximum<double>(broadcast<double>(-1023.0), x);
  const Vector<double> shifter = broadcast<double>(0x1.8p52);
  const Vector<double> shifted = x + shifter;
  const Vector<double> f = x - (shifted - shifter);
  Vector<double> p = broadcast<double>(2.573356830875689123527e-11);
  p = p * f + 4.456675341049205878238e-10;
  p = p * f + 7.054894386348348044488e-9;
  p = p * f + 1.017805119296064896002e-7;
  p = p * f + 0.000001321548681599997697477;
  p = p * f + 0.00001525273385629346641646;
  p = p * f + 0.0001540353039336275529143;
  p = p * f + 0.001333355814639035277484;
  p = p * f + 0.009618129107628483054324;
  p = p * f + 0.0555041086648216989925;
  p = p * f + 0.2402265069591007122809;
  p = p * f + 0.6931471805599453083544;
  p = p * f + 1.0;
  return (Vector<double>)((Integers<double>)p + ((Integers<double>)shifted << 52));
}

// Transposes a square of lanes x lanes values held in one vector per row.
template <class T>
NATTEN_EXT_INLINE void transpose_square(Vector<T>* rows) {
#if NATTEN_EXT_VECTOR_BYTES == 32 && defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    __m256 r[8], s[8];
    for (int i = 0; i < 4; ++i) {
      r[2 * i] = _mm256_unpacklo_ps((__m256)rows[2 * i], (__m256)rows[2 * i + 1]);
      r[2 * i + 1] = _mm256_unpackhi_ps((__m256)rows[2 * i], (__m256)rows[2 * i + 1]);
    }
    for (int i = 0; i < 2; ++i) {
      s[4 * i] = _mm256_shuffle_ps(r[4 * i], r[4 * i + 2], 0x44);
      s[4 * i + 1] = _mm256_shuffle_ps(r[4 * i], r[4 * i + 2], 0xee);
      s[4 * i + 2] = _mm256_shuffle_ps(r[4 * i + 1], r[4 * i + 3], 0x44);
      s[4 * i + 3] = _mm256_shuffle_ps(r[4 * i + 1], r[4 * i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
      rows[i] = (Vector<T>)_mm256_permute2f128_ps(s[i], s[i + 4], 0x20);
      rows[i + 4] = (Vector<T>)_mm256_permute2f128_ps(s[i], s[i + 4], 0x31);
    }
    return;
  }
#elif NATTEN_EXT_VECTOR_BYTES == 64 && defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    __m512 r[16], s[16];
    for (int i = 0; i < 16; i += 2) {
      r[i] = _mm512_unpacklo_ps((__m512)rows[i], (__m512)rows[i + 1]);
      r[i + 1] = _mm512_unpackhi_ps((__m512)rows[i], (__m512)rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {  // s[i + k]: columns k, 4 + k, 8 + k and 12 + k of rows i to i + 3
      s[i] = _mm512_shuffle_ps(r[i], r[i + 2], 0x44);
      s[i + 1] = _mm512_shuffle_ps(r[i], r[i + 2], 0xee);
      s[i + 2] = _mm512_shuffle_ps(r[i + 1], r[i + 3], 0x44);
      s[i + 3] = _mm512_shuffle_ps(r[i + 1], r[i + 3], 0xee);
    }
    for (int k = 0; k < 4; ++k) {
      const __m512 even_low = _mm512_shuffle_f32x4(s[k], s[4 + k], 0x88), odd_low = _mm512_shuffle_f32x4(s[k], s[4 + k], 0xdd);
      const __m512 even_high = _mm512_shuffle_f32x4(s[8 + k], s[12 + k], 0x88);
      const __m512 odd_high = _mm512_shuffle_f32x4(s[8 + k], s[12 + k], 0xdd);
      rows[k] = (Vector<T>)_mm512_shuffle_f32x4(even_low, even_high, 0x88);
      rows[4 + k] = (Vector<T>)_mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
      rows[8 + k] = (Vector<T>)_mm512_shuffle_f32x4(even_low, even_high, 0xdd);
      rows[12 + k] = (Vector<T>)_mm512_shuffle_f32x4(odd_low, odd_high, 0xdd);
    }
    return;
  }
#endif
  constexpr int n = kLanes<T>;
  for (int i = 0; i < n; ++i) {
    for (int j = i + 1; j < n; ++j) {
      const T upper = rows[i][j];
      rows[i][j] = rows[j][i];
      rows[j][i] = upper;
    }
  }
}

}  // namespace natten_ext::NATTEN_EXT_ISA
