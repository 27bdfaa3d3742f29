// Which of the compiled instruction sets the CPU kernels use on this processor.
#pragma once

#include <cstdint>

namespace extrope {

enum Capability : int64_t { kBaseline, kAvx2, kAvx512, kAmx };

// EXTROPE_CPU_CAPABILITY lowers the choice, for tests of the narrower kernels on a wider processor.
// kAmx stands for the tiles of AMX and AVX-512 with its bf16 conversions; only the forwards of the
// attention and of linear attention in bf16 have a form for it.
Capability capability();

// name(isa) of the widest instruction set that this processor has. AMX has AVX-512 too.
#if defined(__x86_64__)
#define EXTROPE_WIDEST(name) \
  (capability() >= kAvx512 ? name(avx512) : capability() == kAvx2 ? name(avx2) : name(baseline))
#else
#define EXTROPE_WIDEST(name) name(baseline)
#endif

}  // namespace extrope
