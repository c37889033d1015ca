// Vectors of the instruction set that this file is compiled for, on the compiler's vector extensions.
//
// NATTEN_EXT_VECTOR_BYTES (16, 32 or 64) and NATTEN_EXT_ISA (the name of the namespace that keeps the variants
// of one kernel apart) come from the build, one pair per variant; see setup.py.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
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

// Vector registers.
constexpr int kRegisters = NATTEN_EXT_VECTOR_BYTES == 64 ? 32 : 16;

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
// The same pointer or vector, which the compiler then keeps in a register: it would rather load what several products share
// once for each of them, and compute addresses again.
template <class T>
NATTEN_EXT_INLINE T* kept(T* p) {
#if defined(__x86_64__)
  asm("" : "+r"(p));
#endif
  return p;
}
template <class V>
NATTEN_EXT_INLINE V kept(V v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#endif
  return v;
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

// log2 of a sum of exponentials: a normal number (to 2 units in the last place), zero or NaN.
// log2(m 2^n) = n + log2(1 + f), 1 + f = m in [2/3, 4/3), = n + f log2(e) + f^2 q(f); q fits to 5e-9 of the logarithm.
NATTEN_EXT_INLINE Vector<float> log2(Vector<float> x) {
  const Integers<float> n = ((Integers<float>)x - 0x3f2aaaab) >> 23;
  const Vector<float> f = (Vector<float>)((Integers<float>)x - (n << 23)) - 1.0f;
  Vector<float> q = broadcast<float>(-0.18681218f);
  q = q * f + 0.20204602f;
  q = q * f - 0.17553538f;
  q = q * f + 0.20199403f;
  q = q * f - 0.24067476f;
  q = q * f + 0.28869405f;
  q = q * f - 0.36066967f;
  q = q * f + 0.48089653f;
  q = q * f - 0.7213475f;
  constexpr float kHigh = 1.44269504088896340736, kLow = 1.44269504088896340736 - static_cast<double>(kHigh);
  const Vector<float> result = __builtin_convertvector(n, Vector<float>) + (f * kHigh + (f * kLow + q * f * f));
  // Not above zero: zero, or NaN.
  return x > 0.0f ? result : x - std::numeric_limits<float>::infinity();
}
// That of double is a symbol of glibc 2.29, newer than what wheels may need; that of long double is as old as glibc.
NATTEN_EXT_INLINE Vector<double> log2(Vector<double> x) {
  for (int lane = 0; lane < kLanes<double>; ++lane) x[lane] = static_cast<double>(std::log2(static_cast<long double>(x[lane])));
  return x;
}

#if defined(__AVX2__)
// The quarters at `first`, at(1), ... as one vector: inserted from memory, they leave the unit that shuffles free.
template <class At>
NATTEN_EXT_INLINE Vector<float> load_quarters(const float* first, const At& at) {
#if NATTEN_EXT_VECTOR_BYTES == 64
  __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(first));
  v = _mm512_insertf32x4(v, _mm_loadu_ps(at(1)), 1);
  v = _mm512_insertf32x4(v, _mm_loadu_ps(at(2)), 2);
  return (Vector<float>)_mm512_insertf32x4(v, _mm_loadu_ps(at(3)), 3);
#else
  const __m256 v = _mm256_castps128_ps256(_mm_loadu_ps(first));
  return (Vector<float>)_mm256_insertf128_ps(v, _mm_loadu_ps(at(1)), 1);
#endif
}

// Transposes four rows of four values in each quarter.
NATTEN_EXT_INLINE void transpose_quarters(Vector<float>* rows) {
#if NATTEN_EXT_VECTOR_BYTES == 64
  using Float = __m512;
#define NATTEN_EXT_SHUFFLE(name, ...) _mm512_##name##_ps(__VA_ARGS__)
#else
  using Float = __m256;
#define NATTEN_EXT_SHUFFLE(name, ...) _mm256_##name##_ps(__VA_ARGS__)
#endif
  const Float a = NATTEN_EXT_SHUFFLE(unpacklo, (Float)rows[0], (Float)rows[1]), b = NATTEN_EXT_SHUFFLE(unpackhi, (Float)rows[0], (Float)rows[1]);
  const Float c = NATTEN_EXT_SHUFFLE(unpacklo, (Float)rows[2], (Float)rows[3]), d = NATTEN_EXT_SHUFFLE(unpackhi, (Float)rows[2], (Float)rows[3]);
  rows[0] = (Vector<float>)NATTEN_EXT_SHUFFLE(shuffle, a, c, 0x44);
  rows[1] = (Vector<float>)NATTEN_EXT_SHUFFLE(shuffle, a, c, 0xee);
  rows[2] = (Vector<float>)NATTEN_EXT_SHUFFLE(shuffle, b, d, 0x44);
  rows[3] = (Vector<float>)NATTEN_EXT_SHUFFLE(shuffle, b, d, 0xee);
#undef NATTEN_EXT_SHUFFLE
}
#endif

// columns[c][r] = row(r)[c], a square of lanes x lanes numbers of the compute type or of halves.
template <class T, class Rows>
NATTEN_EXT_INLINE void load_transposed(const Rows& row, Vector<T>* columns) {
  constexpr int L = kLanes<T>;
#if defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    for (int c = 0; c < L; c += 4) {
      for (int r = 0; r < 4; ++r) {
        columns[c + r] = load_quarters(row(r) + c, [&](int i) __attribute__((always_inline)) { return row(r + 4 * i) + c; });
      }
      transpose_quarters(columns + c);
    }
    return;
  }
#endif
  if constexpr (std::is_same_v<T, std::decay_t<decltype(*row(0))>>) {
    for (int c = 0; c < L; ++c) {
      for (int r = 0; r < L; ++r) columns[c][r] = row(r)[c];
    }
  } else {  // halves are converted by whole vectors
    T rows[L * L];
    for (int r = 0; r < L; ++r) store(rows + r * L, load_wide(row(r)));
    load_transposed<T>([&](int r) { return rows + r * L; }, columns);
  }
}
// Of rows so far apart.
template <class T, class Number>
NATTEN_EXT_INLINE void load_transposed(const Number* source, int64_t stride, Vector<T>* columns) {
  load_transposed<T>([&](int r) __attribute__((always_inline)) { return source + r * stride; }, columns);
}

}  // namespace natten_ext::NATTEN_EXT_ISA
