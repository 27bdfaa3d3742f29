// Registers the CPU kernels of the rotation with a norm before it.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "common/ops.h"
#include "common/rope_norm_bind.h"
#include "cpu/rope/direct.h"
#include "cpu/rope/kernel.h"
#include "cpu/rope/values.h"
#include "cpu/runtime/capability.h"
#include "cpu/runtime/output_pages.h"
#include "cpu/runtime/threads.h"

namespace extrope {
namespace {

#define EXTROPE_NORM_KERNEL(isa) rope_norm_##isa

// The gradients of the weights are summed over this many tokens by one thread, whatever the number
// of threads, so that every number of threads gives the same bits.
constexpr int64_t kPartTokens = 64;

void launch(const RopeNormParams& p, int /*device_index*/) {
  check_values(p);
  const RopeNorms norms = EXTROPE_WIDEST(EXTROPE_NORM_KERNEL);
  const int64_t tokens = std::max<int64_t>(p.norm_part_tokens, 1);
  share_out((p.batch * p.seqlen + tokens - 1) / tokens, tokens * bytes_of_token(p),
            [&](int64_t begin, int64_t end) { norms(p, begin, end); });
}

// In double: the parts are many where the tokens are.
template <typename Wide>
void sum_parts(const Wide* parts, int64_t count, int64_t stride, int64_t dims, Wide* out) {
  std::vector<double> sums(dims);
  for (int64_t part = 0; part < count; ++part) {
    for (int64_t i = 0; i < dims; ++i) sums[i] += parts[part * stride + i];
  }
  for (int64_t i = 0; i < dims; ++i) out[i] = static_cast<Wide>(sums[i]);
}

template <typename Wide>
void run_backward(RopeNormParams& p, const WeightGrads& grads) {
  const int64_t count = (p.batch * p.seqlen + kPartTokens - 1) / kPartTokens;
  p.norm_part_tokens = kPartTokens;
  p.norm_part_stride = grads.dims[0] + grads.dims[1];
  std::vector<Wide> parts(count * p.norm_part_stride);
  p.norm_parts[0] = parts.data(), p.norm_parts[1] = parts.data() + grads.dims[0];
  if (count > 0) launch(p, 0);
  const Tensor* of[2] = {&grads.of_q, &grads.of_k};
  for (int n = 0; n < 2; ++n) {
    sum_parts(static_cast<const Wide*>(p.norm_parts[n]), count, p.norm_part_stride, grads.dims[n],
              static_cast<Wide*>(of[n]->data_ptr()));
  }
}

WeightGrads backward(RopeNormParams& p, const Tensor& like) {
  WeightGrads grads(p, like);
  p.dtype == DType::f64 ? run_backward<double>(p, grads) : run_backward<float>(p, grads);
  return grads;
}

using RopeNormed = RopeNormOps<launch, backward, fresh_like>;

}  // namespace

const Ops ops{
    {"rope_norm_fwd", TORCH_BOX(&RopeNormed::fwd)},
    {"rope_norm_bwd", TORCH_BOX(&RopeNormed::bwd)},
    {"rope_norm_inplace", TORCH_BOX(&RopeNormed::inplace)},
};

EXTROPE_DIRECT(rope_norm) {
  return run_directly(args, [](Items outs, Items numbers, Items given) {
    DirectRotation call(outs, numbers, given, /*with_norm=*/true);
    const RopeNormParams p = call.norm();
    const WithoutPython others_may_run(call.elements() > kFewElements);
    if (call.tokens() > 0) launch(p, /*device_index=*/0);
  });
}

}  // namespace extrope
