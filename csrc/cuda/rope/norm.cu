// RMSNorm and the rotation in one pass, forward.
#include "cuda/rope/norm_call.h"
#include "cuda/rope/norm_kernel.h"

namespace extrope {

int rope_norm_launch(const RopeNormParams& p, void* stream) {
  if (p.batch * p.seqlen == 0) return 0;
  return choose_type(p, [&]<typename T, int VEC>(const NormCall& call) {
    return launch_norm_forward<T, VEC>(call, p.num_tensors, stream);
  });
}

}  // namespace extrope
