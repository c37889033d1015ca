// Numbers of tensors as numbers of the compute type: vectors and single values of float32, float64, bfloat16, float16.
#pragma once

#include "simd.h"

namespace natten_ext::NATTEN_EXT_ISA {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class To, class From>
NATTEN_EXT_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// Single values, by integer operations that any machine has. Rounding is to nearest, ties to even; NaN stays NaN.
inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(BFloat16 value) { return bits_as<float>(static_cast<uint32_t>(value.bits) << 16); }
inline float widen(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16, exponent = value.bits >> 10 & 31u;
  const uint32_t mantissa = value.bits & 0x3ffu;
  if (exponent == 0) return bits_as<float>(sign | bits_as<uint32_t>(static_cast<float>(mantissa) * 0x1p-24f));
  return bits_as<float>(sign | (exponent == 31 ? 0xffu : exponent + 112) << 23 | mantissa << 13);
}

inline void narrow(float value, float* to) { *to = value; }
inline void narrow(double value, double* to) { *to = value; }
inline void narrow(float value, BFloat16* to) {
  const uint32_t wide = bits_as<uint32_t>(value);
  const bool nan = (wide & 0x7fffffffu) > 0x7f800000u;
  to->bits = nan ? 0x7fc0 : static_cast<uint16_t>((wide + 0x7fffu + (wide >> 16 & 1u)) >> 16);
}
inline void narrow(float value, Float16* to) {
  const uint32_t wide = bits_as<uint32_t>(value), size = wide & 0x7fffffffu;
  uint32_t bits;
  if (size > 0x7f800000u) bits = 0x7e00u;
  else if (size >= 0x477ff000u) bits = 0x7c00u;  // 65520 and more round to infinity
  else if (size < 0x38800000u) bits = bits_as<uint32_t>(bits_as<float>(size) + 0.5f) - 0x3f000000u;  // below 2^-14
  else bits = (size - 0x38000000u + 0xfffu + (size >> 13 & 1u)) >> 13;
  to->bits = static_cast<uint16_t>(wide >> 16 & 0x8000u) | static_cast<uint16_t>(bits);
}

// Vectors.
typedef uint16_t Halves __attribute__((vector_size(NATTEN_EXT_VECTOR_BYTES / 2)));
typedef uint16_t UnalignedHalves __attribute__((vector_size(NATTEN_EXT_VECTOR_BYTES / 2), aligned(2), may_alias));
typedef uint32_t Words __attribute__((vector_size(NATTEN_EXT_VECTOR_BYTES)));

NATTEN_EXT_INLINE Vector<float> load_wide(const float* p) { return load(p); }
NATTEN_EXT_INLINE Vector<double> load_wide(const double* p) { return load(p); }
NATTEN_EXT_INLINE Vector<float> load_wide(const BFloat16* p) {
  const Halves halves = *reinterpret_cast<const UnalignedHalves*>(p);
  return (Vector<float>)(__builtin_convertvector(halves, Words) << 16);
}
NATTEN_EXT_INLINE Vector<float> load_wide(const Float16* p) {
#if NATTEN_EXT_VECTOR_BYTES == 64 && defined(__AVX512F__)
  return (Vector<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif NATTEN_EXT_VECTOR_BYTES == 32 && defined(__F16C__)
  return (Vector<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vector<float> result{};
  for (int lane = 0; lane < kLanes<float>; ++lane) result[lane] = widen(p[lane]);
  return result;
#endif
}

NATTEN_EXT_INLINE void store_narrow(float* p, Vector<float> v) { store(p, v); }
NATTEN_EXT_INLINE void store_narrow(double* p, Vector<double> v) { store(p, v); }
NATTEN_EXT_INLINE Halves to_bfloat16(Vector<float> v) {
  const Words wide = (Words)v, nan = (Words)(v != v);
  const Words rounded = (wide + 0x7fffu + (wide >> 16 & 1u)) >> 16;
  return __builtin_convertvector((rounded & ~nan) | (0x7fc0u & nan), Halves);
}
NATTEN_EXT_INLINE void store_narrow(BFloat16* p, Vector<float> v) { *reinterpret_cast<UnalignedHalves*>(p) = to_bfloat16(v); }
NATTEN_EXT_INLINE void store_narrow(Float16* p, Vector<float> v) {
#if NATTEN_EXT_VECTOR_BYTES == 64 && defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif NATTEN_EXT_VECTOR_BYTES == 32 && defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int lane = 0; lane < kLanes<float>; ++lane) narrow(v[lane], p + lane);
#endif
}

// The first n values of a vector, fewer than it has lanes; no others are touched. The other lanes are zero.
#if NATTEN_EXT_VECTOR_BYTES == 64 && defined(__AVX512F__)
NATTEN_EXT_INLINE uint16_t first_lanes(int64_t n) { return static_cast<uint16_t>((1u << n) - 1); }
NATTEN_EXT_INLINE __m256i load_first_halves(const void* p, int64_t n) { return _mm256_maskz_loadu_epi16(first_lanes(n), p); }

NATTEN_EXT_INLINE Vector<float> load_first(const float* p, int64_t n) {
  return (Vector<float>)_mm512_maskz_loadu_ps(first_lanes(n), p);
}
NATTEN_EXT_INLINE Vector<double> load_first(const double* p, int64_t n) {
  return (Vector<double>)_mm512_maskz_loadu_pd(static_cast<uint8_t>(first_lanes(n)), p);
}
NATTEN_EXT_INLINE Vector<float> load_first(const BFloat16* p, int64_t n) {
  return (Vector<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_first_halves(p, n)), 16);
}
NATTEN_EXT_INLINE Vector<float> load_first(const Float16* p, int64_t n) {
  return (Vector<float>)_mm512_cvtph_ps(load_first_halves(p, n));
}
NATTEN_EXT_INLINE void store_first(float* p, Vector<float> v, int64_t n) {
  _mm512_mask_storeu_ps(p, first_lanes(n), (__m512)v);
}
NATTEN_EXT_INLINE void store_first(double* p, Vector<double> v, int64_t n) {
  _mm512_mask_storeu_pd(p, static_cast<uint8_t>(first_lanes(n)), (__m512d)v);
}
NATTEN_EXT_INLINE void store_first(BFloat16* p, Vector<float> v, int64_t n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), (__m256i)to_bfloat16(v));
}
NATTEN_EXT_INLINE void store_first(Float16* p, Vector<float> v, int64_t n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#else
template <class Number>
NATTEN_EXT_INLINE auto load_first(const Number* p, int64_t n) {
  using T = decltype(widen(*p));
  Vector<T> result{};
  for (int64_t lane = 0; lane < n; ++lane) result[lane] = widen(p[lane]);
  return result;
}
template <class Number, class V>
NATTEN_EXT_INLINE void store_first(Number* p, V v, int64_t n) {
  for (int64_t lane = 0; lane < n; ++lane) narrow(v[lane], p + lane);
}
#endif

}  // namespace natten_ext::NATTEN_EXT_ISA
