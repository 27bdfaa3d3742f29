// Which kernels an attention runs on this processor, and how.
#pragma once

#include "cpu/attention/run.h"
#include "cpu/runtime/capability.h"

namespace extrope::attention {

#define EXTROPE_KERNELS(isa)                                                   \
  Kernels {                                                                    \
    attention_plan_##isa, attention_backward_plan_##isa, attention_tile_##isa, \
        attention_backward_tile_##isa                                          \
  }

inline Kernels kernels(DType dtype) {
#if defined(EXTROPE_HAS_BF16)
  if (dtype == DType::bf16 && capability() >= kAvx512Bf16) {
    return EXTROPE_WIDEST_BF16(EXTROPE_KERNELS);
  }
#endif
  return EXTROPE_WIDEST(EXTROPE_KERNELS);
}

#undef EXTROPE_KERNELS

// Every row of q is read once. Those of k are read by many tiles: in 16 bits, where products are
// fast and rotated keys small, the forward has them rotated beforehand.
inline bool rotates_ahead(DType dtype) { return dtype != DType::f32; }

}  // namespace extrope::attention
