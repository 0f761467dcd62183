// The tensor cores' instructions of sm_80 and later: ldmatrix, mma.sync m16n8k16, cp.async; and the numbers
// that they multiply. Fragment layouts are those of the PTX manual, "Matrix Fragments for mma.m16n8k16".
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <utility>

namespace wscl::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// A number that instructions can take as an immediate.
template <int n>
struct Constant {
  __host__ __device__ constexpr operator int() const {
    return n;
  }
};
// f(Constant<0>) … f(Constant<n − 1>).
template <int... i, class F>
__device__ __forceinline__ void for_each_of(std::integer_sequence<int, i...>, const F& f) {
  (f(Constant<i>{}), ...);
}
template <int n, class F>
__device__ __forceinline__ void unrolled(const F& f) {
  for_each_of(std::make_integer_sequence<int, n>{}, f);
}

// 16 bytes from global memory to shared memory, `kOffset` bytes past `to`.
template <int kOffset>
__device__ __forceinline__ void copy_whole_async(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0 + %2], [%1], 16;" ::"r"(to), "l"(from), "n"(kOffset)
               : "memory");
}

// The same, but the last 16 − `bytes` become zero.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void copy_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Until at most kPending of this thread's latest groups are on their way.
template <int kPending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

template <int kOffset>
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], uint32_t row_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4 + %5];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row_address), "n"(kOffset)
               : "memory");
}

template <int kOffset>
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&to)[4], uint32_t row_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4 + %5];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row_address), "n"(kOffset)
               : "memory");
}

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 2^n for an integer n ≤ 0, exactly; 0 below the normal range, 0 for −∞.
__device__ __forceinline__ float power_of_two(float n) {
  return n < -126.f ? 0.f : __int_as_float((static_cast<int>(n) + 127) << 23);
}

// Beyond ± this a float has no fraction. A shift's rounding, which a product in a multiply-add does not have,
// and what the order of a sum does to a similarity are whole exponents there, and soon more than exponents
// bear.
constexpr float kFarShift = 8388608.f;  // 2^23
__device__ __forceinline__ bool is_far(float shift) {
  return fabsf(shift) > kFarShift;
}

// What a tensor core multiplies. kLimit: weights up to it can be packed, with room for a few more.
// kSigmoidBoost: what numbers of [0, 1] are multiplied by, for the same.
// kHeadroom: log2 of the weight that the largest logit gets, so that small ones stay in the normal range.
struct BFloat16 {
  using type = __nv_bfloat16;
  static constexpr float kLimit = 1152921504606846976.f;  // 2^60
  static constexpr float kHeadroom = 0;
  static constexpr float kSigmoidBoost = 1;

  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
  }
  static __device__ __forceinline__ float low(uint32_t packed) {
    return __uint_as_float(packed << 16);
  }
  static __device__ __forceinline__ float high(uint32_t packed) {
    return __uint_as_float(packed & 0xffff0000u);
  }
  // to = a · b + c
  static __device__ __forceinline__ void multiply_add(float (&to)[4], const uint32_t (&a)[4], uint32_t b0,
                                                      uint32_t b1, const float (&c)[4]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=f"(to[0]), "=f"(to[1]), "=f"(to[2]), "=f"(to[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]),
          "f"(c[3]));
  }
};

struct Float16 {
  using type = __half;
  static constexpr float kLimit = 32768.f;
  static constexpr float kHeadroom = 8;
  static constexpr float kSigmoidBoost = 16384.f;

  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
  }
  // to = a · b + c
  static __device__ __forceinline__ void multiply_add(float (&to)[4], const uint32_t (&a)[4], uint32_t b0,
                                                      uint32_t b1, const float (&c)[4]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=f"(to[0]), "=f"(to[1]), "=f"(to[2]), "=f"(to[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]),
          "f"(c[3]));
  }
};

}  // namespace wscl::cuda
