// Registers the CPU kernels of the rotation and splits their work over torch's threads.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/ops.h"
#include "common/rope_bind.h"
#include "cpu/rope/direct.h"
#include "cpu/rope/kernel.h"
#include "cpu/rope/values.h"
#include "cpu/runtime/capability.h"
#include "cpu/runtime/output_pages.h"
#include "cpu/runtime/threads.h"

namespace extrope {
namespace {

#define EXTROPE_KERNEL(isa) rope_tokens_##isa

void launch(const RopeParams& p, int /*device_index*/) {
  check_values(p);
  const RopeTokens tokens = EXTROPE_WIDEST(EXTROPE_KERNEL);
  share_out(p.batch * p.seqlen, bytes_of_token(p),
            [&](int64_t begin, int64_t end) { tokens(p, begin, end); });
}

using Rope = RopeOps<launch, fresh_like>;

void set_given(RopeParams& p, const Tensor& cos, const Tensor& sin, const Tensor& q) {
  const int64_t half = cos.dim() == 3 ? cos.size(2) : -1;
  require(half >= 1 && half <= p.head_dim / 2 && cos.size(1) == p.seqlen &&
              (cos.size(0) == p.batch || cos.size(0) == 1),
          "cos must be (", p.batch, " or 1, ", p.seqlen, ", rotary_dim/2), got ", shape_of(cos));
  bool alike = sin.dim() == 3 && sin.scalar_type() == cos.scalar_type();
  for (int64_t i = 0; alike && i < 3; ++i) alike = sin.size(i) == cos.size(i);
  require(alike, "sin must have cos's dtype and shape ", shape_of(cos), ", got ", shape_of(sin));
  require(cos.get_device() == q.get_device() && sin.get_device() == q.get_device(),
          "cos and sin must be on q's device");
  for (const Tensor& x : {cos, sin}) {
    require(half == 1 || x.stride(2) == 1,
            "cos and sin must be contiguous in their last dimension");
  }
  p.cos = cos.data_ptr(), p.sin = sin.data_ptr();
  p.cos_sin_dtype = rotated_dtype(cos, "cos");
  p.cos_batch = cos.size(0) > 1 ? cos.stride(0) : 0, p.cos_seq = cos.stride(1);
  p.sin_batch = sin.size(0) > 1 ? sin.stride(0) : 0, p.sin_seq = sin.stride(1);
  p.rotary_dim = 2 * half;
  p.angle_heads = 1;
}

std::tuple<Tensor, Tensor> rope_cos_sin(const Tensor& q, const OptionalTensor& k, const Tensor& cos,
                                        const Tensor& sin, bool interleaved, bool conjugate) {
  RopeParams p{};
  set_tensors(p, q, k, /*packed=*/false);
  p.interleaved = interleaved;
  p.conjugate = conjugate;
  set_given(p, cos, sin, q);
  const std::tuple<Tensor, Tensor> outs = make_outputs<fresh_like>(p, q, k, /*packed=*/false);
  Rope::run(p, q);
  return outs;
}

}  // namespace

const Ops ops{
    {"rope_fwd", TORCH_BOX(&Rope::fwd)},
    {"rope_bwd", TORCH_BOX(&Rope::bwd)},
    {"rope_inplace", TORCH_BOX(&Rope::inplace)},
    {"rope_cos_sin", TORCH_BOX(&rope_cos_sin)},
};

EXTROPE_DIRECT(rope) {
  return run_directly(args, [](Items outs, Items numbers, Items given) {
    const DirectRotation call(outs, numbers, given, /*with_norm=*/false);
    const WithoutPython others_may_run(call.elements() > kFewElements);
    if (call.tokens() > 0) launch(call.rope(), /*device_index=*/0);
  });
}

}  // namespace extrope
