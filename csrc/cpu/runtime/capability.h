// The instruction set that CPU kernels use on this processor.
#pragma once

#include <cstdint>

namespace extrope {

// Those of x86 in order, each with all before it; then those of other processors.
enum Capability : int64_t { kBaseline, kAvx2, kAvx512, kAvx512Bf16, kAmx, kNeon };

// EXTROPE_CPU_CAPABILITY lowers the choice on x86, to test narrower kernels on a wider processor,
// or requests kAvx512Bf16 on processors where that is slow. kAvx512Bf16 means AVX-512's products of
// pairs of bf16, kAmx AMX's tiles too: attention in bf16 has kernels for each.
Capability capability();

// name(isa) for this processor's widest instruction set: a general one, and one for bf16 if it has
// one. A build of only one instruction set defines the first itself.
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
