// The architecture layer of csrc/cuda/arch.h on the host. Same names, same meaning; every access is checked.
#pragma once

#include <cmath>
#include <cstring>
#include <source_location>

#include "machine.h"

#define NATTEN_EXT_DEVICE inline
#define NATTEN_EXT_KERNEL(threads, blocks) void
#define NATTEN_EXT_PARAMETER(T) const T
#define NATTEN_EXT_UNROLL
#define NATTEN_EXT_NO_UNROLL
#define NATTEN_EXT_UNROLL_BY(count)

namespace natten_ext::cuda {

using emulator::Site;

// ------------------------------------------------------------------------------------------ places

inline int forget(int number) { return number; }
inline uint64_t forget(uint64_t number) { return number; }
inline float forget(float number) { return number; }
inline void hold_back_loads() {}
inline bool never(float) { return false; }
constexpr bool kLoadsFarAhead = false;

inline int thread_index() { return emulator::place().thread; }
inline int block_threads() { return emulator::place().threads; }
inline int block_x() { return emulator::place().block_x; }
inline int block_y() { return emulator::place().block_y; }
inline int grid_x() { return emulator::place().grid_x; }

// ------------------------------------------------------------------------------------------ memory

template <class T>
T load_shared(Shared address, Site site = Site::current()) {
  T value;
  emulator::read_shared(address, &value, sizeof(T), site);
  return value;
}
template <class T>
void store_shared(Shared address, T value, Site site = Site::current()) {
  emulator::write_shared(address, &value, sizeof(T), site);
}
template <class T>
T load_global(const T* address, Site site = Site::current()) {
  T value;
  emulator::read_global(address, &value, sizeof(T), site);
  return value;
}
template <class T>
void store_global(T* address, T value, Site site = Site::current()) {
  emulator::write_global(address, &value, sizeof(T), site);
}

inline void store_global(uint64_t address, const Vector16& value, Site site = Site::current()) {
  emulator::write_global(reinterpret_cast<void*>(address), &value, sizeof(value), site);
}

template <int Bytes>
void copy_async(Shared destination, const void* source, bool valid, Site site = Site::current()) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  emulator::copy_async(destination, source, Bytes, valid, site);
}
inline void copy_async_commit() { emulator::copy_async_commit(); }
template <int Pending>
void copy_async_wait(Site site = Site::current()) {
  emulator::copy_async_wait(Pending, site);
}

// ------------------------------------------------------------------------------------------ threads together

inline void sync_block(Site site = Site::current()) { emulator::sync_block(site); }
inline void sync_warp(Site site = Site::current()) { emulator::sync_warp(site); }

template <class T>
T shuffle(T value, int lane, Site site = Site::current()) {
  struct Operands {
    T value, result;
    int lane;
  } o{value, value, lane};
  emulator::collective(
      [](void* const* lanes) {
        const auto of = [&](int i) { return static_cast<Operands*>(lanes[i]); };
        for (int i = 0; i < kWarp; ++i) of(i)->result = of(of(i)->lane & 31)->value;
      },
      &o, site);
  return o.result;
}
template <class T>
T shuffle_xor(T value, int mask, Site site = Site::current()) {
  return shuffle(value, (thread_index() % kWarp) ^ mask, site);
}
inline bool any_in_warp(bool condition, Site site = Site::current()) {
  emulator::collective(
      [](void* const* lanes) {
        bool any = false;
        for (int i = 0; i < kWarp; ++i) any |= *static_cast<bool*>(lanes[i]);
        for (int i = 0; i < kWarp; ++i) *static_cast<bool*>(lanes[i]) = any;
      },
      &condition, site);
  return condition;
}
inline bool any_in_block(bool condition, Site site = Site::current()) { return emulator::any_in_block(condition, site); }

// ------------------------------------------------------------------------------------------ numbers

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Nearest, ties away from zero.
inline uint32_t round_to_tf32(uint32_t bits) {
  if ((bits & 0x7f800000u) == 0x7f800000u) return bits;
  return (bits + 0x1000u) & ~0x1fffu;
}

inline uint16_t round_to_bfloat(float value) {
  const uint32_t bits = bits_of(value);
  if (std::isnan(value)) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline uint16_t round_to_half(float value) {
  const uint16_t sign = static_cast<uint16_t>((bits_of(value) >> 16) & 0x8000u);
  if (std::isnan(value)) return 0x7fff;
  const float size = std::fabs(value);
  if (size >= 65520.0f) return sign | 0x7c00u;
  if (size < 6.103515625e-05f) {  // subnormal: multiples of 2^-24, rounded to nearest even
    return static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyintf(size * 16777216.0f)));
  }
  const uint32_t bits = bits_of(size);
  return static_cast<uint16_t>(sign | ((bits + 0xfffu + ((bits >> 13) & 1u) - (112u << 23)) >> 13));
}

inline float widen(Bfloat value) { return from_bits(static_cast<uint32_t>(value.bits) << 16); }
inline float widen(Half value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16, exponent = (value.bits >> 10) & 31u, mantissa = value.bits & 0x3ffu;
  if (exponent == 31) return from_bits(sign | 0x7f800000u | (mantissa << 13));
  if (exponent == 0) return std::copysign(static_cast<float>(mantissa) / 16777216.0f, from_bits(sign | 0x3f800000u));
  return from_bits(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

template <class Element>
uint32_t pack(float low, float high);
template <>
inline uint32_t pack<Half>(float low, float high) {
  return round_to_half(low) | static_cast<uint32_t>(round_to_half(high)) << 16;
}
template <>
inline uint32_t pack<Bfloat>(float low, float high) {
  return round_to_bfloat(low) | static_cast<uint32_t>(round_to_bfloat(high)) << 16;
}

inline float magnitude(float value) { return std::fabs(value); }
template <class Real>
bool is_negative_zero(Real value) {
  return value == 0 && std::signbit(value);
}

inline uint32_t multiply_high(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
}

inline float power_of_two(float x) { return x < -126.0f ? 0.0f : std::exp2(x); }
inline double power_of_two(double x) { return std::exp2(x); }
inline float reciprocal(float x) { return 1 / x; }
inline uint64_t multiply_add_wide(uint32_t a, uint32_t b, uint64_t c) { return uint64_t{a} * b + c; }
inline float larger(float a, float b) { return std::fmax(a, b); }
inline double larger(double a, double b) { return std::fmax(a, b); }
inline float binary_logarithm(float x) { return std::log2(x); }
inline double binary_logarithm(double x) { return std::log2(x); }
inline float quick_logarithm(float x) { return std::log2(x); }
inline float fused_multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline double fused_multiply_add(double a, double b, double c) { return std::fma(a, b, c); }

// ------------------------------------------------------------------------------------------ matrices

template <bool Transposed, int Count>
void load_matrices_of(uint32_t (&r)[Count], Shared row, Site site) {
  struct Operands {
    uint32_t r[Count];
    uint16_t elements[8];  // the lane's row
  } o;
  if (thread_index() % kWarp < 8 * Count) emulator::read_shared(row, o.elements, 16, site);
  emulator::collective(
      [](void* const* lanes) {
        const auto of = [&](int i) { return static_cast<Operands*>(lanes[i]); };
        for (int i = 0; i < kWarp; ++i) {
          for (int matrix = 0; matrix < Count; ++matrix) {
            uint32_t pair = 0;
            for (int e = 0; e < 2; ++e) {
              const int y = Transposed ? 2 * (i % 4) + e : i / 4, x = Transposed ? i / 4 : 2 * (i % 4) + e;
              pair |= static_cast<uint32_t>(of(8 * matrix + y)->elements[x]) << (16 * e);
            }
            of(i)->r[matrix] = pair;
          }
        }
      },
      &o, site);
  std::memcpy(r, o.r, sizeof(r));
}
template <int Count>
void load_matrices(uint32_t (&r)[Count], Shared row, Site site = Site::current()) {
  load_matrices_of<false>(r, row, site);
}
template <int Count>
void load_matrices_transposed(uint32_t (&r)[Count], Shared row, Site site = Site::current()) {
  load_matrices_of<true>(r, row, site);
}

inline void store_matrices(Shared row, const uint32_t (&r)[4], Site site = Site::current()) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    const int lane = thread_index() % kWarp;
    const Shared to = shuffle(row, 8 * matrix + lane / 4, site) + 4 * (lane % 4);
    emulator::write_shared(to, &r[matrix], 4, site);
  }
}

// Element (k = 0 or 1) of a fragment's register.
template <class Element>
float element_of(uint32_t word, int k) {
  return widen(Element{static_cast<uint16_t>(word >> (16 * k))});
}

// c += a b, whose depth is that of `Registers` registers of the right operand.
template <class Element, int Registers>
void multiply_of(float (&c)[4], const uint32_t (&a)[2 * Registers], const uint32_t (&b)[Registers], Site site) {
  struct Operands {
    float c[4];
    uint32_t a[2 * Registers], b[Registers];
  } o;
  std::memcpy(o.c, c, sizeof(c));
  std::memcpy(o.a, a, sizeof(a));
  std::memcpy(o.b, b, sizeof(b));
  emulator::collective(
      [](void* const* lanes) {
        const auto of = [&](int i) { return static_cast<Operands*>(lanes[i]); };
        constexpr bool kHalves = sizeof(Element) == 2;
        constexpr int kDepth = (kHalves ? 8 : 4) * Registers;
        float left[16][kDepth], right[kDepth][8];
        for (int i = 0; i < kWarp; ++i) {
          const int g = i / 4, t = i % 4;
          for (int r = 0; r < 2 * Registers; ++r) {  // rows g and g + 8 of the first part of the depth, then the second
            const int row = g + 8 * (r % 2);
            if constexpr (kHalves) {
              for (int e = 0; e < 2; ++e) left[row][8 * (r / 2) + 2 * t + e] = element_of<Element>(of(i)->a[r], e);
            } else {
              left[row][4 * (r / 2) + t] = from_bits(of(i)->a[r] & ~0x1fffu);
            }
          }
          for (int r = 0; r < Registers; ++r) {
            if constexpr (kHalves) {
              for (int e = 0; e < 2; ++e) right[8 * r + 2 * t + e][g] = element_of<Element>(of(i)->b[r], e);
            } else {
              right[4 * r + t][g] = from_bits(of(i)->b[r] & ~0x1fffu);
            }
          }
        }
        for (int i = 0; i < kWarp; ++i) {
          for (int r = 0; r < 4; ++r) {
            const int row = i / 4 + 8 * (r / 2), column = 2 * (i % 4) + r % 2;
            float sum = of(i)->c[r];
            for (int k = 0; k < kDepth; ++k) sum += left[row][k] * right[k][column];
            of(i)->c[r] = sum;
          }
        }
      },
      &o, site);
  std::memcpy(c, o.c, sizeof(c));
}
template <class Element>
void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site = Site::current()) {
  multiply_of<Element, 2>(c, a, {b0, b1}, site);
}
template <class Element>
void multiply(float (&c)[4], const uint32_t (&a)[2], uint32_t b, Site site = Site::current()) {
  static_assert(sizeof(Element) == 2);
  multiply_of<Element, 1>(c, a, {b}, site);
}

template <class Element, class... Operands>
void multiply_from(float (&c)[4], const float (&start)[4], const Operands&... operands) {
  std::memcpy(c, start, sizeof(c));
  multiply<Element>(c, operands...);
}

}  // namespace natten_ext::cuda
