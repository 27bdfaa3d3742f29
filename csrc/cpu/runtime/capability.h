// Which of the compiled instruction sets the CPU kernels use on this processor.
#pragma once

#include <cstdint>

namespace extrope {

// Those of x86 in order, each with all before it; then what other processors have.
enum Capability : int64_t { kBaseline, kAvx2, kAvx512, kAvx512Bf16, kAmx, kNeon };

// EXTROPE_CPU_CAPABILITY lowers the choice on x86, for tests of the narrower kernels on a wider
// processor, or asks for kAvx512Bf16 where it is there, but slow. That stands for AVX-512's
// products of pairs of bf16, kAmx for the tiles of AMX beside them: attention in bf16 has kernels
// for each.
Capability capability();

// name(isa) of the widest instruction set that this processor has: of the general ones, and of
// those for bf16 where it has one. A build of one instruction set alone defines the first itself.
#if defined(EXTROPE_WIDEST)
#elif defined(__x86_64__)
#define EXTROPE_WIDEST(name) \
  (capability() >= kAvx512 ? name(avx512) : capability() == kAvx2 ? name(avx2) : name(baseline))
#elif defined(__aarch64__)
#define EXTROPE_WIDEST(name) name(neon)
#else
#define EXTROPE_WIDEST(name) name(baseline)
#endif
#define EXTROPE_WIDEST_BF16(name) (capability() == kAmx ? name(amx) : name(avx512_bf16))

}  // namespace extrope
