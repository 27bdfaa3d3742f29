// The ops of the CUDA kernel of the rotation, which start it on torch's current stream.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "common/ops.h"
#include "common/rope_bind.h"
#include "cuda/rope/kernel.h"
#include "cuda/stream.h"

namespace extrope {
namespace {

void launch(const RopeParams& p, int device_index) {
  if (p.batch * p.seqlen == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(device_index);
  const int error = rope_launch(p, current_stream("rope", device_index), device_index);
  require(error == 0, "CUDA error ", error, ": ", rope_error(error));
}

const Ops ops{
    {"rope_fwd", TORCH_BOX(&RopeOps<launch>::fwd)},
    {"rope_bwd", TORCH_BOX(&RopeOps<launch>::bwd)},
    {"rope_inplace", TORCH_BOX(&RopeOps<launch>::inplace)},
};

}  // namespace
}  // namespace extrope
