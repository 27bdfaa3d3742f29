// The work of one thread of the fused rotary embedding. It owns two vectors of VEC dims of one
// token, computes the sines and cosines of their VEC pairs once, and applies them to its share of
// the heads of q and then of k.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cassert>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/rope/token.h"

namespace extrope {
namespace {

// -------------------------------------------------------------------------------------------------
// Vectors of elements in memory, and their widening to the precision of the arithmetic

template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

// VEC elements in memory. Two-byte types stay packed in 32-bit words, or each would take its own
// register.
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

// Copies as uint4, in one instruction; the compiler would split some copies of Lanes.
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

// Returns true if steps of `stride` elements along a dimension keep accesses of `vec` elements
// aligned.
inline bool multiple(int64_t extent, int64_t stride, int vec) {
  return extent == 1 || stride % vec == 0;
}

// A thread's dims of one head: VEC of the first half of the rotated dims and VEC of the second, in
// either layout, so that the threads of a token access whole neighbouring vectors.
template <typename T, int VEC>
struct Owned {
  Lanes<T, VEC> half[2];

  template <typename Acc>
  __device__ void widen_to(Acc* lanes) const {
    unpack(half[0], lanes);
    unpack(half[1], lanes + VEC);
  }
};

// -------------------------------------------------------------------------------------------------
// The thread

// The distribution of heads along blockIdx.y. The heads of q and k form one list if they rotate
// alike; if every head has its own frequencies, a group is head blockIdx.y of both.
struct HeadGroups {
  int size;
  bool per_head;
};

// GRAD: can sum the angle gradient; the one-element kernel always can, to save instantiations.
// AXES: can take positions by axis, which costs registers; so can the one-element kernel.
template <typename T, int VEC, bool INTERLEAVED, bool GRAD, bool AXES>
struct Worker {
  using Acc = Accumulator<T>;
  using Own = Owned<T, VEC>;
  static constexpr int UNROLL = GRAD ? 2 : 4;  // heads in flight
  static constexpr int SUMMED = 8;             // heads per partial sum of an angle gradient

  const RopeParams& p;
  const DeviceToken& token;
  HeadGroups groups;

  // Calls visit(tensor, begin, end) with this block's heads of q, then of k.
  template <typename Visit>
  __device__ void for_each_tensor(Visit visit) const {
    int begin = groups.size * static_cast<int>(blockIdx.y);
#pragma unroll 1
    for (int t = 0; t < p.num_tensors; ++t) {
      const RopeTensor& x = p.tensors[t];
      const int heads = static_cast<int>(x.heads), end = begin + groups.size;
      if (end > 0) visit(x, begin < 0 ? 0 : begin, end < heads ? end : heads);
      if (!groups.per_head) begin -= heads;
    }
  }

  __device__ const T* input(const RopeTensor& x) const {
    return static_cast<const T*>(x.in) + token.batch * x.in_batch + token.seq * x.in_seq;
  }
  __device__ const T* saved(const RopeTensor& x) const {
    return static_cast<const T*>(x.saved) + token.batch * x.saved_batch + token.seq * x.saved_seq;
  }
  __device__ T* output(const RopeTensor& x) const {
    return static_cast<T*>(x.out) + token.batch * x.out_batch + token.seq * x.out_seq;
  }

  __device__ int pair_of(int slot, int j) const {
    if constexpr (!INTERLEAVED) return slot * VEC + j;
    constexpr int PAIRS = VEC > 1 ? VEC / 2 : 1;  // per vector of the two
    return slot * PAIRS + j % PAIRS + j / PAIRS * static_cast<int>(p.rotary_dim / 4);
  }

  // Adds up in blocks: over many heads that loses fewer digits than one running sum.
  __device__ static void flush(Acc* partial, Acc* sum) {
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
      sum[j] += partial[j];
      partial[j] = 0;
    }
  }

  // The first dims of this thread's two vectors in a head.
  struct Dims {
    int a, b;
  };

  __device__ Dims dims_of(int slot) const {
    const bool neighbours = VEC == 1 && p.interleaved;
    const int a = neighbours ? 2 * slot : VEC * slot;
    return {a, neighbours ? a + 1 : a + static_cast<int>(p.rotary_dim / 2)};
  }

  __device__ void rotate(int slot) const {
    const Dims dims = dims_of(slot);
    const bool wants_grad = GRAD && p.angle_grad != nullptr;
    Acc cosine[VEC], sine[VEC], angle_grad[VEC] = {}, partial[VEC] = {};
    bool ready = false;
    for_each_tensor([&](const RopeTensor& x, int begin, int end) {
      const T* in = input(x);
      const T* kept_in = wants_grad ? saved(x) : nullptr;
      T* out = output(x);
      if (p.log_decay != nullptr) ready = false;  // q and k decay in opposite directions
#pragma unroll 1
      for (int head = begin; head < end; head += UNROLL) {
        if (wants_grad && head % SUMMED == 0) flush(partial, angle_grad);
        Own own[UNROLL], kept[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
          if (head + u >= end) break;
          own[u] = load_head(in + (head + u) * x.in_head, dims);
          if (wants_grad) kept[u] = load_head(kept_in + (head + u) * x.saved_head, dims);
        }
        if (!ready) {  // after the loads, whose latency hides it
          find_rotation(slot, head, x.decay_sign, cosine, sine);
          ready = true;
        }
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
          if (head + u >= end) break;
          rotate_head(&own[u], cosine, sine, wants_grad, kept[u], partial);
          store_head(own[u], out + (head + u) * x.out_head, dims);
        }
      }
    });
    if (wants_grad) store_angle_grad(slot, angle_grad, partial);
  }

  __device__ static Own load_head(const T* from, Dims dims) {
    return {load<T, VEC>(from + dims.a), load<T, VEC>(from + dims.b)};
  }

  __device__ static void store_head(const Own& own, T* to, Dims dims) {
    store<T, VEC>(to + dims.a, own.half[0]);
    store<T, VEC>(to + dims.b, own.half[1]);
  }

  // Computes cosines and sines of this thread's pairs.
  __device__ void find_rotation(int slot, int head, double decay_sign, Acc* cosine,
                                Acc* sine) const {
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
      pair_rotation<AXES>(p, token, head, pair_of(slot, j), decay_sign, &cosine[j], &sine[j]);
    }
  }

  // Rotates a head. With wants_grad it is a head of gradients and `kept` is the forward's input:
  // then it also adds to the gradient of the angles.
  __device__ static void rotate_head(Own* own, const Acc* cosine, const Acc* sine, bool wants_grad,
                                     const Own& kept, Acc* angle_grad) {
    Acc dim[2 * VEC], kept_dim[2 * VEC];
    own->widen_to(dim);
    if (wants_grad) kept.widen_to(kept_dim);
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
      const int first = INTERLEAVED ? 2 * j : j, second = INTERLEAVED ? 2 * j + 1 : j + VEC;
      const Acc a = dim[first], b = dim[second];
      dim[first] = fma(a, cosine[j], -(b * sine[j]));
      dim[second] = fma(b, cosine[j], a * sine[j]);
      if (wants_grad) {
        const Acc cross = kept_dim[second] * dim[first];
        angle_grad[j] += fma(kept_dim[first], dim[second], -cross);
      }
    }
    pack(dim, own->half[0]);
    pack(dim + VEC, own->half[1]);
  }

  __device__ void store_angle_grad(int slot, const Acc* sum, const Acc* partial) const {
    const int64_t row =
        (token.batch * p.seqlen + token.seq) * p.angle_heads + (p.angle_heads > 1 ? blockIdx.y : 0);
    Acc* to = static_cast<Acc*>(p.angle_grad) + row * (p.rotary_dim / 2);
#pragma unroll
    for (int j = 0; j < VEC; ++j) to[pair_of(slot, j)] = sum[j] + partial[j];
  }

  // Copies dims that do not rotate; in place they are already there. Dim 0 is the first rotated
  // one.
  __device__ void copy(int dim) const {
    for_each_tensor([&](const RopeTensor& x, int begin, int end) {
      if (x.in == x.out) return;
      const T* in = input(x) + dim;
      T* out = output(x) + dim;
#pragma unroll 1
      for (int head = begin; head < end; head += UNROLL) {
        Lanes<T, VEC> dims[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
          if (head + u < end) dims[u] = load<T, VEC>(in + (head + u) * x.in_head);
        }
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
          if (head + u < end) store<T, VEC>(out + (head + u) * x.out_head, dims[u]);
        }
      }
    });
  }
};

}  // namespace
}  // namespace extrope
