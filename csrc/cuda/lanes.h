// Vectors of elements in memory, and their widening to the precision of the arithmetic.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cassert>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace extrope {

template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

// VEC elements in memory. Two-byte types stay packed in 32-bit words, or each would take a register
// of its own.
template <typename T, int VEC>
struct alignas(sizeof(T) * VEC) Lanes {
  static constexpr bool PACKED = sizeof(T) == 2 && VEC > 1;
  using Word = std::conditional_t<PACKED, uint32_t, T>;
  Word word[PACKED ? VEC / 2 : VEC];
};

__device__ inline double widen(double x) { return x; }
__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

__device__ inline void narrow(double x, double* to) { *to = x; }
__device__ inline void narrow(float x, float* to) { *to = x; }
__device__ inline void narrow(float x, __nv_bfloat16* to) { *to = __float2bfloat16_rn(x); }
__device__ inline void narrow(float x, __half* to) { *to = __float2half_rn(x); }
__device__ inline void narrow(float low, float high, __nv_bfloat162* to) {
  *to = __floats2bfloat162_rn(low, high);
}
__device__ inline void narrow(float low, float high, __half2* to) {
  *to = __floats2half2_rn(low, high);
}

template <typename T>
using Two = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;

template <typename T, int VEC, typename Acc>
__device__ inline void unpack(const Lanes<T, VEC>& from, Acc* to) {
  if constexpr (Lanes<T, VEC>::PACKED) {
#pragma unroll
    for (int i = 0; i < VEC / 2; ++i) {
      Two<T> two;
      std::memcpy(static_cast<void*>(&two), &from.word[i], sizeof(two));
      to[2 * i] = widen(two.x);
      to[2 * i + 1] = widen(two.y);
    }
  } else {
#pragma unroll
    for (int i = 0; i < VEC; ++i) to[i] = widen(from.word[i]);
  }
}

template <typename T, int VEC, typename Acc>
__device__ inline void pack(const Acc* from, Lanes<T, VEC>& to) {
  if constexpr (Lanes<T, VEC>::PACKED) {
#pragma unroll
    for (int i = 0; i < VEC / 2; ++i) {
      Two<T> two;
      narrow(from[2 * i], from[2 * i + 1], &two);
      std::memcpy(&to.word[i], &two, sizeof(two));
    }
  } else {
#pragma unroll
    for (int i = 0; i < VEC; ++i) narrow(from[i], &to.word[i]);
  }
}

template <typename T, int VEC>
__device__ inline void check_alignment(const T* address) {
#ifndef __CUDACC__
  assert(reinterpret_cast<uintptr_t>(address) % sizeof(Lanes<T, VEC>) == 0);
#endif
}

// Through uint4, which is one instruction; the compiler splits some copies of Lanes itself.
template <typename T, int VEC>
using Access = std::conditional_t<sizeof(Lanes<T, VEC>) == sizeof(uint4), uint4, Lanes<T, VEC>>;

template <typename T, int VEC>
__device__ inline Lanes<T, VEC> load(const T* from) {
  check_alignment<T, VEC>(from);
  const auto access = *reinterpret_cast<const Access<T, VEC>*>(from);
  Lanes<T, VEC> lanes;
  std::memcpy(static_cast<void*>(&lanes), &access, sizeof(lanes));
  return lanes;
}

template <typename T, int VEC>
__device__ inline void store(T* to, const Lanes<T, VEC>& lanes) {
  check_alignment<T, VEC>(to);
  Access<T, VEC> access;
  std::memcpy(static_cast<void*>(&access), &lanes, sizeof(lanes));
  *reinterpret_cast<Access<T, VEC>*>(to) = access;
}

// Whether steps of `stride` elements along a dimension keep accesses of `vec` elements aligned.
inline bool multiple(int64_t extent, int64_t stride, int vec) {
  return extent == 1 || stride % vec == 0;
}

// What a thread owns of one head: VEC dims of the first half of the rotated ones and VEC of the
// second, in either layout, so that the threads of a token touch whole neighbouring vectors.
template <typename T, int VEC>
struct Owned {
  Lanes<T, VEC> half[2];

  template <typename Acc>
  __device__ void widen_to(Acc* lanes) const {
    unpack(half[0], lanes);
    unpack(half[1], lanes + VEC);
  }
};

}  // namespace extrope
