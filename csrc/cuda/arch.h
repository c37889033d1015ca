// The architecture layer: everything that kernels ask of a GPU. Kernels use only these names, so that the same
// sources compile for a device (this file, inline PTX for sm_80 and later) and for the host (csrc/emulator/device.h,
// one fiber per thread). docs/cuda.md describes both.
//
// Shared memory is addressed by byte offsets into the block's one dynamic allocation.
#pragma once

#include <cstdint>
#include <type_traits>

namespace natten_ext::cuda {

// The two 16-bit formats as bits; arithmetic is in float.
struct Half {
  uint16_t bits;
};
struct Bfloat {
  uint16_t bits;
};

using Shared = uint32_t;

struct alignas(16) Vector16 {
  uint32_t words[4];
};

constexpr int kWarp = 32;

}  // namespace natten_ext::cuda

#if defined(NATTEN_EXT_EMULATOR)
#include "../emulator/device.h"
#else

#include <cuda_runtime.h>

#define NATTEN_EXT_DEVICE __device__ __forceinline__
#define NATTEN_EXT_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define NATTEN_EXT_PARAMETER(T) const __grid_constant__ T
#define NATTEN_EXT_UNROLL _Pragma("unroll")
#define NATTEN_EXT_NO_UNROLL _Pragma("unroll 1")
#define NATTEN_EXT_PRAGMA(text) _Pragma(#text)
#define NATTEN_EXT_UNROLL_BY(count) NATTEN_EXT_PRAGMA(unroll count)

namespace natten_ext::cuda {

extern __shared__ __align__(16) unsigned char dynamic_shared[];

// ------------------------------------------------------------------------------------------ places

// The same number, of which the compiler knows nothing: what is computed from it is computed when it is needed.
NATTEN_EXT_DEVICE int forget(int number) {
  asm volatile("" : "+r"(number));
  return number;
}

NATTEN_EXT_DEVICE uint64_t forget(uint64_t number) {
  asm volatile("" : "+l"(number));
  return number;
}

NATTEN_EXT_DEVICE float forget(float number) {
  asm volatile("" : "+f"(number));
  return number;
}

// Nothing that a program could tell: but the compiler moves no loads from behind it to before it, which saves registers.
NATTEN_EXT_DEVICE void hold_back_loads() { __syncwarp(); }
// The same where that does not help: false for a number that is not negative, which the compiler does not know. A branch on it
// ends what loads are moved across.
NATTEN_EXT_DEVICE bool never(float not_negative) { return __any_sync(0xffffffffu, not_negative < 0); }
// Whether that has to be asked more often: for compute capability 10 the compiler loads further ahead, and spills.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr bool kLoadsFarAhead = true;
#else
constexpr bool kLoadsFarAhead = false;
#endif

NATTEN_EXT_DEVICE int thread_index() { return threadIdx.x; }
NATTEN_EXT_DEVICE int block_threads() { return blockDim.x; }
NATTEN_EXT_DEVICE int block_x() { return blockIdx.x; }
NATTEN_EXT_DEVICE int block_y() { return blockIdx.y; }
NATTEN_EXT_DEVICE int grid_x() { return gridDim.x; }

// ------------------------------------------------------------------------------------------ memory

template <class T>
NATTEN_EXT_DEVICE T load_shared(Shared address) {
  return *reinterpret_cast<const T*>(dynamic_shared + address);
}
template <class T>
NATTEN_EXT_DEVICE void store_shared(Shared address, T value) {
  *reinterpret_cast<T*>(dynamic_shared + address) = value;
}
template <class T>
NATTEN_EXT_DEVICE T load_global(const T* address) {
  return *address;
}
template <class T>
NATTEN_EXT_DEVICE void store_global(T* address, T value) {
  *address = value;
}
// To an address that was computed as a number.
NATTEN_EXT_DEVICE void store_global(uint64_t address, const Vector16& value) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(value.words[0]), "r"(value.words[1]), "r"(value.words[2]),
               "r"(value.words[3]) : "memory");
}

NATTEN_EXT_DEVICE uint32_t shared_window(Shared address) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(dynamic_shared)) + address;
}

// Starts a copy of 4, 8 or 16 bytes to shared memory; zeros if not `valid`, and then the source is not read.
template <int Bytes>
NATTEN_EXT_DEVICE void copy_async(Shared destination, const void* source, bool valid) {
  const int bytes = valid ? Bytes : 0;
  if constexpr (Bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_window(destination)), "l"(source), "r"(bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_window(destination)), "l"(source), "n"(Bytes), "r"(bytes) : "memory");
  }
}
// Ends a group of copies. Every thread waits for its own groups; a barrier then shows them to the others.
NATTEN_EXT_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `Pending` of the thread's groups are under way.
template <int Pending>
NATTEN_EXT_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// ------------------------------------------------------------------------------------------ threads together

NATTEN_EXT_DEVICE void sync_block() { __syncthreads(); }
NATTEN_EXT_DEVICE void sync_warp() { __syncwarp(); }
template <class T>
NATTEN_EXT_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
template <class T>
NATTEN_EXT_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
NATTEN_EXT_DEVICE bool any_in_warp(bool condition) { return __any_sync(0xffffffffu, condition); }
// A barrier too.
NATTEN_EXT_DEVICE bool any_in_block(bool condition) { return __syncthreads_or(condition); }

// ------------------------------------------------------------------------------------------ matrices
//
// Fragments are those of PTX: with g = lane / 4 and t = lane % 4, c[0], c[1] are row g, columns 2t and 2t + 1, and
// c[2], c[3] row g + 8, of a 16 x 8 result.

// Four or two 8 x 8 matrices of 16-bit elements (8 x 4 of 32-bit ones); lane l gives the address of row l % 8 of matrix
// l / 8. Of two matrices, lanes 16 to 31 give none.
NATTEN_EXT_DEVICE void load_matrices(uint32_t (&r)[4], Shared row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_window(row))
               : "memory");
}
NATTEN_EXT_DEVICE void load_matrices(uint32_t (&r)[2], Shared row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_window(row))
               : "memory");
}
NATTEN_EXT_DEVICE void load_matrices_transposed(uint32_t (&r)[4], Shared row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_window(row))
               : "memory");
}

NATTEN_EXT_DEVICE void load_matrices_transposed(uint32_t (&r)[2], Shared row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_window(row))
               : "memory");
}

// Writes four 8 x 8 matrices as load_matrices reads them.
NATTEN_EXT_DEVICE void store_matrices(Shared row, const uint32_t (&r)[4]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  NATTEN_EXT_UNROLL
  for (int matrix = 0; matrix < 4; ++matrix) {
    const int lane = threadIdx.x % kWarp;
    store_shared(shuffle(row, 8 * matrix + lane / 4) + 4 * (lane % 4), r[matrix]);
  }
#else
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_window(row)), "r"(r[0]), "r"(r[1]), "r"(r[2]),
               "r"(r[3]) : "memory");
#endif
}

// c += a b for 16 x 16 times 16 x 8 in half precision, and 16 x 8 times 8 x 8 in TF32.
template <class Element>
NATTEN_EXT_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
NATTEN_EXT_DEVICE void multiply<Half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
NATTEN_EXT_DEVICE void multiply<Bfloat>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
NATTEN_EXT_DEVICE void multiply<float>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same for 16 x 8 times 8 x 8 in half precision.
template <class Element>
NATTEN_EXT_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[2], uint32_t b);
template <>
NATTEN_EXT_DEVICE void multiply<Half>(float (&c)[4], const uint32_t (&a)[2], uint32_t b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(b));
}
template <>
NATTEN_EXT_DEVICE void multiply<Bfloat>(float (&c)[4], const uint32_t (&a)[2], uint32_t b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(b));
}

// c = start + a b, where c += a b would first copy what starts several products.
template <class Element>
NATTEN_EXT_DEVICE void multiply_from(float (&c)[4], const float (&start)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<Element, Half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
        : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(start[0]), "f"(start[1]), "f"(start[2]), "f"(start[3]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
        : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(start[0]), "f"(start[1]), "f"(start[2]), "f"(start[3]));
  }
}
template <class Element>
NATTEN_EXT_DEVICE void multiply_from(float (&c)[4], const float (&start)[4], const uint32_t (&a)[2], uint32_t b) {
  if constexpr (std::is_same_v<Element, Half>) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %8, %9, %10};"
        : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b), "f"(start[0]), "f"(start[1]), "f"(start[2]), "f"(start[3]));
  } else {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %8, %9, %10};"
        : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b), "f"(start[0]), "f"(start[1]), "f"(start[2]), "f"(start[3]));
  }
}

// ------------------------------------------------------------------------------------------ numbers

NATTEN_EXT_DEVICE uint32_t bits_of(float value) { return __float_as_uint(value); }
NATTEN_EXT_DEVICE float from_bits(uint32_t bits) { return __uint_as_float(bits); }

// The nearest TF32 number, in the bits of a float.
NATTEN_EXT_DEVICE uint32_t round_to_tf32(uint32_t bits) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(from_bits(bits)));
  return rounded;
}

template <class Element>
NATTEN_EXT_DEVICE uint32_t pack(float low, float high);
template <>
NATTEN_EXT_DEVICE uint32_t pack<Half>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
template <>
NATTEN_EXT_DEVICE uint32_t pack<Bfloat>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

NATTEN_EXT_DEVICE float widen(Half value) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
}
NATTEN_EXT_DEVICE float widen(Bfloat value) { return from_bits(static_cast<uint32_t>(value.bits) << 16); }

NATTEN_EXT_DEVICE float magnitude(float value) { return fabsf(value); }
NATTEN_EXT_DEVICE bool is_negative_zero(float value) { return __float_as_uint(value) == 0x80000000u; }
NATTEN_EXT_DEVICE bool is_negative_zero(double value) { return __double_as_longlong(value) == static_cast<long long>(1ull << 63); }

NATTEN_EXT_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }

// In float, what is below the normal range is zero.
NATTEN_EXT_DEVICE float power_of_two(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
NATTEN_EXT_DEVICE double power_of_two(double x) { return exp2(x); }
// To a unit in the last place.
NATTEN_EXT_DEVICE float reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
// a * b + c, one instruction.
NATTEN_EXT_DEVICE uint64_t multiply_add_wide(uint32_t a, uint32_t b, uint64_t c) {
  uint64_t result;
  asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(result) : "r"(a), "r"(b), "l"(c));
  return result;
}
// NaN only if both are.
NATTEN_EXT_DEVICE float larger(float a, float b) { return fmaxf(a, b); }
NATTEN_EXT_DEVICE double larger(double a, double b) { return fmax(a, b); }
NATTEN_EXT_DEVICE float binary_logarithm(float x) { return log2f(x); }
NATTEN_EXT_DEVICE double binary_logarithm(double x) { return log2(x); }
// With an error of 2^-22 of the result, or of 2^-22 from 0.5 to 2.
NATTEN_EXT_DEVICE float quick_logarithm(float x) {
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
NATTEN_EXT_DEVICE float fused_multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
NATTEN_EXT_DEVICE double fused_multiply_add(double a, double b, double c) { return fma(a, b, c); }

}  // namespace natten_ext::cuda

#endif

namespace natten_ext::cuda {

NATTEN_EXT_DEVICE float widen(float value) { return value; }
NATTEN_EXT_DEVICE double widen(double value) { return value; }

template <class Element, class Real>
NATTEN_EXT_DEVICE Element narrow(Real value) {
  if constexpr (sizeof(Element) == 2) {
    return Element{static_cast<uint16_t>(pack<Element>(static_cast<float>(value), 0.0f))};
  } else {
    return static_cast<Element>(value);
  }
}

}  // namespace natten_ext::cuda
