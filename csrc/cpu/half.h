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

// Numbers of float32 from bits of halves and back, by integer operations that any machine has: of single values (Word is
// uint32_t) or of vectors. Rounding is to nearest, ties to even; NaN stays NaN.
template <class Real, class Word>
NATTEN_EXT_INLINE Real bfloat16_to_real(Word bits) {
  return bits_as<Real>(bits << 16);
}
template <class Real, class Word>
NATTEN_EXT_INLINE Real float16_to_real(Word bits) {
  const Word sign = (bits & 0x8000u) << 16, size = (bits & 0x7fffu) << 13, exponent = size >> 23;
  // The bias of the exponent is 15, and becomes 127. Below 2^-14 numbers are multiples of 2^-24: those from 2^-14 on, less that.
  const Word small = bits_as<Word>(bits_as<Real>(size + (113u << 23)) - 0x1p-14f);
  const Word infinite = size + (224u << 23);
  return bits_as<Real>(sign | (exponent == 0u ? small : exponent == 31u ? infinite : size + (112u << 23)));
}
template <class Word, class Real>
NATTEN_EXT_INLINE Word real_to_bfloat16(Real value) {
  const Word wide = bits_as<Word>(value), rounded = (wide + 0x7fffu + (wide >> 16 & 1u)) >> 16;
  return value != value ? Word{} + 0x7fc0u : rounded;
}
template <class Word, class Real>
NATTEN_EXT_INLINE Word real_to_float16(Real value) {
  const Word wide = bits_as<Word>(value), size = wide & 0x7fffffffu;
  const Word normal = (size - 0x38000000u + 0xfffu + (size >> 13 & 1u)) >> 13;
  const Word small = bits_as<Word>(bits_as<Real>(size) + 0.5f) - 0x3f000000u;  // below 2^-14
  const Word number = size < 0x38800000u ? small : normal;
  const Word finite = size < 0x477ff000u ? number : Word{} + 0x7c00u;  // 65520 and more round to infinity
  return (wide >> 16 & 0x8000u) | (value != value ? Word{} + 0x7e00u : finite);
}

// Single values.
inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(BFloat16 value) { return bfloat16_to_real<float>(uint32_t{value.bits}); }
inline float widen(Float16 value) { return float16_to_real<float>(uint32_t{value.bits}); }

inline void narrow(float value, float* to) { *to = value; }
inline void narrow(double value, double* to) { *to = value; }
inline void narrow(float value, BFloat16* to) { to->bits = static_cast<uint16_t>(real_to_bfloat16<uint32_t>(value)); }
inline void narrow(float value, Float16* to) { to->bits = static_cast<uint16_t>(real_to_float16<uint32_t>(value)); }

// Vectors.
typedef uint16_t Halves __attribute__((vector_size(NATTEN_EXT_VECTOR_BYTES / 2)));
typedef uint16_t UnalignedHalves __attribute__((vector_size(NATTEN_EXT_VECTOR_BYTES / 2), aligned(2), may_alias));
typedef uint32_t Words __attribute__((vector_size(NATTEN_EXT_VECTOR_BYTES)));

// __builtin_convertvector, for which GCC takes several shuffles in place of one instruction.
NATTEN_EXT_INLINE Words words_of(Halves halves) {
#if NATTEN_EXT_VECTOR_BYTES == 64 && defined(__AVX512F__)
  return (Words)_mm512_cvtepu16_epi32((__m256i)halves);
#elif NATTEN_EXT_VECTOR_BYTES == 32 && defined(__AVX2__)
  return (Words)_mm256_cvtepu16_epi32((__m128i)halves);
#else
  return __builtin_convertvector(halves, Words);
#endif
}
// Of words below 2^16.
NATTEN_EXT_INLINE Halves halves_of(Words words) {
#if NATTEN_EXT_VECTOR_BYTES == 64 && defined(__AVX512F__)
  return (Halves)_mm512_cvtepi32_epi16((__m512i)words);
#elif NATTEN_EXT_VECTOR_BYTES == 32 && defined(__AVX2__)
  return (Halves)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)words), _mm256_extracti128_si256((__m256i)words, 1));
#else
  return __builtin_convertvector(words, Halves);
#endif
}

// Of the format that the pointer names.
NATTEN_EXT_INLINE Vector<float> widen(const BFloat16*, Halves halves) { return bfloat16_to_real<Vector<float>>(words_of(halves)); }
NATTEN_EXT_INLINE Vector<float> widen(const Float16*, Halves halves) {
#if NATTEN_EXT_VECTOR_BYTES == 64 && defined(__AVX512F__)
  return (Vector<float>)_mm512_cvtph_ps((__m256i)halves);
#elif NATTEN_EXT_VECTOR_BYTES == 32 && defined(__F16C__)
  return (Vector<float>)_mm256_cvtph_ps((__m128i)halves);
#else
  return float16_to_real<Vector<float>>(words_of(halves));
#endif
}
NATTEN_EXT_INLINE Halves narrow(Vector<float> v, const BFloat16*) { return halves_of(real_to_bfloat16<Words>(v)); }
NATTEN_EXT_INLINE Halves narrow(Vector<float> v, const Float16*) {
#if NATTEN_EXT_VECTOR_BYTES == 64 && defined(__AVX512F__)
  return (Halves)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif NATTEN_EXT_VECTOR_BYTES == 32 && defined(__F16C__)
  return (Halves)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  return halves_of(real_to_float16<Words>(v));
#endif
}

NATTEN_EXT_INLINE Vector<float> load_wide(const float* p) { return load(p); }
NATTEN_EXT_INLINE Vector<double> load_wide(const double* p) { return load(p); }
template <class Half>
NATTEN_EXT_INLINE Vector<float> load_wide(const Half* p) {
  return widen(p, *reinterpret_cast<const UnalignedHalves*>(p));
}
NATTEN_EXT_INLINE void store_narrow(float* p, Vector<float> v) { store(p, v); }
NATTEN_EXT_INLINE void store_narrow(double* p, Vector<double> v) { store(p, v); }
template <class Half>
NATTEN_EXT_INLINE void store_narrow(Half* p, Vector<float> v) {
  *reinterpret_cast<UnalignedHalves*>(p) = narrow(v, p);
}

// As that of float.
template <class Half, class At>
NATTEN_EXT_INLINE Vector<float> load_quarters(const Half* first, const At& at) {
  typedef uint64_t Quarters __attribute__((vector_size(NATTEN_EXT_VECTOR_BYTES / 2)));
  Quarters quarters;
  for (int i = 0; i < kLanes<float> / 4; ++i) {
    uint64_t quarter;
    std::memcpy(&quarter, i == 0 ? first : at(i), sizeof quarter);
    quarters[i] = quarter;
  }
  return widen(first, (Halves)quarters);
}

// The first n values of a vector, fewer than it has lanes; no others are touched. The other lanes are zero.
#if NATTEN_EXT_VECTOR_BYTES == 64 && defined(__AVX512F__)
NATTEN_EXT_INLINE uint16_t first_lanes(int64_t n) { return static_cast<uint16_t>((1u << n) - 1); }

NATTEN_EXT_INLINE Vector<float> load_first(const float* p, int64_t n) {
  return (Vector<float>)_mm512_maskz_loadu_ps(first_lanes(n), p);
}
NATTEN_EXT_INLINE Vector<double> load_first(const double* p, int64_t n) {
  return (Vector<double>)_mm512_maskz_loadu_pd(static_cast<uint8_t>(first_lanes(n)), p);
}
template <class Half>
NATTEN_EXT_INLINE Vector<float> load_first(const Half* p, int64_t n) {
  return widen(p, (Halves)_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
NATTEN_EXT_INLINE void store_first(float* p, Vector<float> v, int64_t n) {
  _mm512_mask_storeu_ps(p, first_lanes(n), (__m512)v);
}
NATTEN_EXT_INLINE void store_first(double* p, Vector<double> v, int64_t n) {
  _mm512_mask_storeu_pd(p, static_cast<uint8_t>(first_lanes(n)), (__m512d)v);
}
template <class Half>
NATTEN_EXT_INLINE void store_first(Half* p, Vector<float> v, int64_t n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), (__m256i)narrow(v, p));
}
#else
template <class Number>
NATTEN_EXT_INLINE auto load_first(const Number* p, int64_t n) {
  Number numbers[kLanes<decltype(widen(*p))>] = {};
  for (int64_t lane = 0; lane < n; ++lane) numbers[lane] = p[lane];
  return load_wide(numbers);
}
template <class Number, class V>
NATTEN_EXT_INLINE void store_first(Number* p, V v, int64_t n) {
  Number numbers[sizeof(V) / sizeof(v[0])];
  store_narrow(numbers, v);
  for (int64_t lane = 0; lane < n; ++lane) p[lane] = numbers[lane];
}
#endif

}  // namespace natten_ext::NATTEN_EXT_ISA
