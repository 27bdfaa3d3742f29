// The CPU kernels of the rotation, one for each instruction set that rope_kernel.cpp is compiled
// for.
#pragma once

#include <cstdint>

#include "common/rope_params.h"

namespace extrope {

// Rotates the tokens begin..end-1 of the batch * seqlen tokens in row-major order.
using RopeTokens = void (*)(const RopeParams&, int64_t begin, int64_t end);

void rope_tokens_baseline(const RopeParams&, int64_t begin, int64_t end);
void rope_tokens_avx2(const RopeParams&, int64_t begin, int64_t end);
void rope_tokens_avx512(const RopeParams&, int64_t begin, int64_t end);
void rope_tokens_neon(const RopeParams&, int64_t begin, int64_t end);

}  // namespace extrope
