// The ops of the CUDA kernels of the rotation with a norm before it, on torch's current stream.

#include <torch/csrc/stable/library.h>

#include "common/ops.h"
#include "common/rope_norm_bind.h"
#include "cuda/rope/kernel.h"
#include "cuda/rope/norm_kernel.h"
#include "cuda/stream.h"

namespace extrope {
namespace {

void check_dims(const RopeNormParams& p) {
  require(p.head_dim <= kMaxNormedDim, "head_dim must be at most ", kMaxNormedDim,
          " with norm weights on a GPU, got ", p.head_dim);
}

void check(int error) { require(error == 0, "CUDA error ", error, ": ", rope_error(error)); }

void launch(const RopeNormParams& p, int device_index) {
  check_dims(p);
  const OnDevice device("rope", device_index);
  check(rope_norm_launch(p, device.stream));
}

// The parts live until this returns: torch gives their memory to what comes later on the stream.
WeightGrads backward(RopeNormParams& p, const Tensor& like) {
  check_dims(p);
  const OnDevice device("rope", like.get_device());
  WeightGrads grads(p, like);
  const int64_t tokens = p.batch * p.seqlen, element = p.dtype == DType::f64 ? 8 : 4;
  p.norm_part_tokens = norm_part_tokens(tokens);
  p.norm_part_stride = grads.dims[0] + grads.dims[1];
  const int64_t count = (tokens + p.norm_part_tokens - 1) / p.norm_part_tokens;
  const Tensor parts = grads.new_row(like, count * p.norm_part_stride);
  p.norm_parts[0] = parts.data_ptr();
  p.norm_parts[1] = static_cast<char*>(parts.data_ptr()) + grads.dims[0] * element;
  void* const of[2] = {grads.of_q.data_ptr(), grads.of_k.data_ptr()};
  check(rope_norm_backward_launch(p, device.stream));
  check(rope_norm_sum_launch(p, count, grads.dims, of, device.stream));
  return grads;
}

using RopeNormed = RopeNormOps<launch, backward>;

const Ops ops{
    {"rope_norm_fwd", TORCH_BOX(&RopeNormed::fwd)},
    {"rope_norm_bwd", TORCH_BOX(&RopeNormed::bwd)},
    {"rope_norm_inplace", TORCH_BOX(&RopeNormed::inplace)},
};

}  // namespace
}  // namespace extrope
