// What the kernels with a norm do with a head, a lane at a time: slots of dims, weights, sums over
// the lanes, cosines and sines from shared memory, the rotation.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/lanes.h"
#include "cuda/rope/norm_operand.h"
#include "cuda/rope/rotation.h"

namespace extrope {

__device__ inline float root(float x) { return sqrtf(x); }
__device__ inline double root(double x) { return sqrt(x); }

// Which of an operand's lanes, rows and tokens a thread is.
struct Seat {
  int lane, row, token;
};

__device__ inline Seat find_seat(const NormOperand& of) {
  const int thread = static_cast<int>(threadIdx.x), head = thread / of.lanes;
  return {thread & (of.lanes - 1), head & (of.rows - 1), head / of.rows};
}

struct Slot {
  int index, a, b;  // the first dims of its two vectors; b < 0: there is one
  bool rotated;
};

template <int VEC>
__device__ inline Slot find_slot(const NormOperand& of, int index, bool interleaved) {
  const int rotated = of.rotary_dim / (2 * VEC);
  if (index < rotated) {
    if (VEC == 1 && interleaved) return {index, 2 * index, 2 * index + 1, true};
    return {index, VEC * index, VEC * index + of.rotary_dim / 2, true};
  }
  const int a = of.rotary_dim + 2 * VEC * (index - rotated), b = a + VEC;
  return {index, a, b < of.head_dim ? b : -1, false};
}

template <typename T, int VEC>
__device__ inline Owned<T, VEC> load_slot(const T* row, const Slot& slot) {
  Owned<T, VEC> own{};
  own.half[0] = load<T, VEC>(row + slot.a);
  if (slot.b >= 0) own.half[1] = load<T, VEC>(row + slot.b);
  return own;
}

template <int VEC, typename Acc>
__device__ inline Acc squares_of(const Acc* dims) {
  Acc sum = 0;
#pragma unroll
  for (int j = 0; j < 2 * VEC; ++j) sum = fma(dims[j], dims[j], sum);
  return sum;
}

// The sum over the lanes of a head, the same bits in all of them. The whole warp takes part.
template <typename Acc>
__device__ inline Acc sum_over_lanes(Acc x, int lanes) {
#pragma unroll 1
  for (int step = lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

template <typename W, int VEC, typename Acc>
__device__ inline void load_weights(const void* from, int64_t at, Acc* to) {
  constexpr int PIECE = VEC < static_cast<int>(16 / sizeof(W)) ? VEC : 16 / sizeof(W);
#pragma unroll
  for (int j = 0; j < VEC; j += PIECE) {
    const auto lanes = load<W, PIECE>(static_cast<const W*>(from) + at + j);
    Accumulator<W> wide[PIECE];
    unpack(lanes, wide);
#pragma unroll
    for (int i = 0; i < PIECE; ++i) to[j + i] = static_cast<Acc>(wide[i]);
  }
}

// The weights of a slot; `first` is that of the head's first dim.
template <int VEC, typename Acc>
__device__ inline void load_weights(const RopeNorm& norm, int64_t first, const Slot& slot,
                                    Acc* to) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int dim = half == 0 ? slot.a : slot.b;
    if (dim < 0) break;
    switch (norm.weight_dtype) {
      case DType::f32:
        load_weights<float, VEC>(norm.weight, first + dim, to + half * VEC);
        break;
      case DType::f64:
        load_weights<double, VEC>(norm.weight, first + dim, to + half * VEC);
        break;
      case DType::bf16:
        load_weights<__nv_bfloat16, VEC>(norm.weight, first + dim, to + half * VEC);
        break;
      default:
        load_weights<__half, VEC>(norm.weight, first + dim, to + half * VEC);
    }
  }
}

// Cosines and sines in shared memory: half of each, of the thread's token or head.
template <typename Acc>
struct CosSin {
  Acc* cos;
  int half;
  bool per_head;

  __device__ CosSin(Acc* memory, const NormOperand& of, const Seat& seat, bool per_head)
      : cos(memory +
            int64_t{per_head ? seat.token * of.rows + seat.row : seat.token} * of.rotary_dim),
        half(of.rotary_dim / 2),
        per_head(per_head) {}

  // By threads first, first + step, ...
  __device__ void fill(const RopeParams& p, const Token<double>& token, int head, double decay_sign,
                       int first, int step) const {
#pragma unroll 1
    for (int pair = first; pair < half; pair += step) {
      pair_rotation<true>(p, token, head, pair, decay_sign, cos + pair, cos + half + pair);
    }
  }

  // Where heads have their own frequencies, of a head, -1 for none; its warp alone waits.
  __device__ void fill_head(const RopeParams& p, const Token<double>& token, int head,
                            const NormOperand& of, int lane) const {
    if (!per_head || half == 0) return;
    __syncwarp();
    if (head >= 0) fill(p, token, head, of.x.decay_sign, lane, of.lanes);
    __syncwarp();
  }

  // Of the pairs of a slot, in the order of its dims.
  template <int VEC>
  __device__ void read(int slot, bool interleaved, Acc* cosine, Acc* sine) const {
    constexpr int PIECE = VEC > 1 ? VEC / 2 : 1;
    const int first = interleaved ? slot * PIECE : slot * VEC;
    const int second = interleaved ? first + half / 2 : first + PIECE;
    unpack(load<Acc, PIECE>(cos + first), cosine);
    unpack(load<Acc, PIECE>(cos + half + first), sine);
    if constexpr (VEC > 1) {
      unpack(load<Acc, PIECE>(cos + second), cosine + PIECE);
      unpack(load<Acc, PIECE>(cos + half + second), sine + PIECE);
    }
  }
};

// Of the 2 * VEC dims of a slot, VEC pairs.
template <int VEC, bool NEIGHBOURS, typename Acc>
__device__ inline void rotate_pairs(Acc* dims, const Acc* cosine, const Acc* sine) {
#pragma unroll
  for (int j = 0; j < VEC; ++j) {
    const int first = NEIGHBOURS ? 2 * j : j, second = NEIGHBOURS ? 2 * j + 1 : j + VEC;
    const Acc a = dims[first], b = dims[second];
    dims[first] = fma(a, cosine[j], -(b * sine[j]));
    dims[second] = fma(b, cosine[j], a * sine[j]);
  }
}

template <int VEC, typename Acc>
__device__ inline void rotate_slot(const CosSin<Acc>& angles, int slot, bool interleaved,
                                   Acc* dims) {
  Acc cosine[VEC], sine[VEC];
  angles.template read<VEC>(slot, interleaved, cosine, sine);
  if (VEC > 1 && interleaved) {
    rotate_pairs<VEC, true>(dims, cosine, sine);
  } else {
    rotate_pairs<VEC, false>(dims, cosine, sine);
  }
}

}  // namespace extrope
