// Registers the CUDA kernel of the rotation and starts it on torch's current stream.

#include <torch/csrc/stable/library.h>

#include "common/rope_bind.h"
#include "cuda/rope/kernel.h"
#include "cuda/stream.h"

namespace extrope {
namespace {

void launch(const RopeParams& p, int device_index) {
  const int error = rope_launch(p, current_stream("rope", device_index), device_index);
  require(error == 0, "CUDA error ", error, ": ", rope_error(error));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(extrope, CUDA, m) {
  m.impl("rope_fwd", TORCH_BOX(&RopeOps<launch>::fwd));
  m.impl("rope_bwd", TORCH_BOX(&RopeOps<launch>::bwd));
  m.impl("rope_inplace", TORCH_BOX(&RopeOps<launch>::inplace));
}

}  // namespace extrope
