// Soft caps of logits, and sinks, for attention kernels with and without a cache.
#pragma once

#include "cpu/simd/tanh.h"

namespace extrope {
namespace {

// Computes softcap * tanh(logits / softcap) from logits / softcap; to base 2 with log2(e) in
// softcap.
template <int Count>
EXTROPE_INLINE void cap(floats (&logits)[Count], float softcap) {
  scaled_tanhs(logits, softcap);
}

// Adds a sink to a row. `scale` is the factor of the sums over its keys; lse is the log-sum-exp of
// its logits, -inf for a row without keys.
inline void join_sink(float sink, float& scale, float& lse) {
  if (lse == -__builtin_inff()) {
    lse = sink;
    return;
  }
  const float above = sink - lse, ratio = __builtin_expf(above);
  scale /= 1.0f + ratio;
  lse = above > 0 ? sink + __builtin_log1pf(__builtin_expf(-above)) : lse + __builtin_log1pf(ratio);
}

}  // namespace
}  // namespace extrope
