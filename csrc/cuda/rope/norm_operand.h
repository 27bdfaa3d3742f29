// One tensor of a rotation with a norm before it, and how a block of threads shares it out.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/rope_norm_params.h"
#include "cuda/lanes.h"

namespace extrope {

constexpr int NORM_BLOCK = 128;                 // threads
constexpr int64_t NORM_TABLE_BYTES = 32 << 10;  // of cosines and sines, at most
constexpr int INVALID_VALUE = 1;  // cudaErrorInvalidValue, also where no CUDA header is

// A block takes `tokens` tokens at a time, `rows` heads of each, and a head by `lanes` lanes of one
// warp. All are powers of two, and their product is NORM_BLOCK or, where tables would not fit,
// less.
struct NormOperand {
  RopeTensor x;
  RopeNorm norm;
  int32_t head_dim, rotary_dim;  // 0: not rotated
  int32_t lanes, rows, tokens;
};

// A lane holds a slot at a time: two vectors of VEC dims, those of VEC pairs or, past the pairs, of
// neighbours.
__host__ __device__ inline int count_slots(const NormOperand& of, int vec) {
  const int pairs = of.rotary_dim / (2 * vec), rest = of.head_dim - of.rotary_dim;
  return pairs + (rest + 2 * vec - 1) / (2 * vec);
}

inline int32_t power_of_two(int64_t at_least, int32_t at_most) {
  int32_t power = 1;
  while (power < at_least && power < at_most) power *= 2;
  return power;
}

// Elements of the table of cosines and sines: of every token, or of every head at work.
__host__ __device__ inline int64_t table_size(const NormOperand& of, bool per_head) {
  return int64_t{of.tokens} * (per_head ? of.rows : 1) * of.rotary_dim;
}

inline NormOperand norm_operand(const RopeTensor& x, const RopeNorm& norm, int64_t head_dim,
                                int64_t rotary_dim, int vec, int64_t wide, bool per_head) {
  NormOperand of{};
  of.x = x, of.norm = norm;
  of.head_dim = static_cast<int32_t>(head_dim), of.rotary_dim = static_cast<int32_t>(rotary_dim);
  of.lanes = power_of_two(count_slots(of, vec), 32);
  of.rows = power_of_two(x.heads, NORM_BLOCK / of.lanes);
  of.tokens = NORM_BLOCK / (of.lanes * of.rows);
  const auto too_large = [&] { return table_size(of, per_head) * wide > NORM_TABLE_BYTES; };
  while (too_large() && of.tokens > 1) of.tokens /= 2;
  while (too_large() && of.rows > 1) of.rows /= 2;
  return of;
}

// Whether every access of `vec` elements stays aligned, inside its part of a head, and a head fits
// the lanes of a warp.
inline bool fits(const NormOperand& of, int64_t batch, int64_t seqlen, int vec, int bytes) {
  const RopeTensor& x = of.x;
  if (of.rotary_dim / 2 % vec != 0 || of.head_dim % vec != 0 || count_slots(of, vec) > 32) {
    return false;
  }
  const auto aligned = [](const void* address, int size) {
    return reinterpret_cast<uintptr_t>(address) % size == 0;
  };
  if (!aligned(x.in, vec * bytes) || !aligned(x.saved, vec * bytes) ||
      !aligned(of.norm.weight, 16)) {
    return false;
  }
  return multiple(batch, x.in_batch, vec) && multiple(batch, x.saved_batch, vec) &&
         multiple(seqlen, x.in_seq, vec) && multiple(seqlen, x.saved_seq, vec) &&
         multiple(x.heads, x.in_head, vec) && multiple(x.heads, x.saved_head, vec);
}

// Likewise for what is written, in elements of `bytes`.
inline bool output_fits(const RopeTensor& x, int64_t blocks, int64_t slots, int vec, int bytes) {
  return reinterpret_cast<uintptr_t>(x.out) % (vec * bytes) == 0 &&
         multiple(blocks, x.out_batch, vec) && multiple(slots, x.out_seq, vec) &&
         multiple(x.heads, x.out_head, vec);
}

}  // namespace extrope
