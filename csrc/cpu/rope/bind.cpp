// Registers the CPU kernels of the rotation, with and without a norm before it, and splits their
// work over torch's threads.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "common/ops.h"
#include "common/rope_bind.h"
#include "cpu/rope/kernel.h"
#include "cpu/runtime/capability.h"
#include "cpu/runtime/threads.h"

namespace extrope {
namespace {

#define EXTROPE_KERNEL(isa) rope_tokens_##isa

void launch(const RopeParams& p, int /*device_index*/) {
  check_values(p);
  if (p.batch * p.seqlen == 0) return;
  const RopeTokens tokens = EXTROPE_WIDEST(EXTROPE_KERNEL);
  share_out(p.batch * p.seqlen, bytes_of_token(p),
            [&](int64_t begin, int64_t end) { tokens(p, begin, end); });
}

using Rope = RopeOps<launch>;

// -------------------------------------------------------------------------------------------------
// With a norm

#define EXTROPE_NORM_KERNEL(isa) rope_norm_##isa

// One thread sums gradients of the weights over this many tokens, so that the result does not
// depend on the number of threads.
constexpr int64_t kPartTokens = 64;

void launch_norm(const RopeNormParams& p) {
  check_values(p);
  if (p.batch * p.seqlen == 0) return;
  const RopeNorms norms = EXTROPE_WIDEST(EXTROPE_NORM_KERNEL);
  const int64_t tokens = std::max<int64_t>(p.norm_part_tokens, 1);
  share_out((p.batch * p.seqlen + tokens - 1) / tokens, tokens * bytes_of_token(p),
            [&](int64_t begin, int64_t end) { norms(p, begin, end); });
}

EXTROPE_FUNCTION(TwoTensors, norm_fwd, const Tensor& q, const OptionalTensor& k,
                 const OptionalTensor& q_norm_weight,
                 const OptionalTensor& k_norm_weight EXTROPE_ROPE_PARAMETERS,
                 double norm_eps EXTROPE_ROPE_NUMBERS(EXTROPE_PARAMETER)) {
  const RopeParams rope = make_params(q, k, inv_freq, positions, EXTROPE_ROPE_OPTIONS,
                                      /*adjoint=*/false);
  RopeNormParams p = make_norm_params(rope, q, k, q_norm_weight, k_norm_weight, norm_eps);
  const auto outs = make_outputs("rope", p, q, k, cu_seqlens.has_value());
  launch_norm(p);
  return outs;
}

EXTROPE_FUNCTION(void, norm_inplace, const Tensor& q, const OptionalTensor& k,
                 const OptionalTensor& q_norm_weight,
                 const OptionalTensor& k_norm_weight EXTROPE_ROPE_PARAMETERS,
                 double norm_eps EXTROPE_ROPE_NUMBERS(EXTROPE_PARAMETER)) {
  const RopeParams rope = make_params(q, k, inv_freq, positions, EXTROPE_ROPE_OPTIONS,
                                      /*adjoint=*/false);
  RopeNormParams p = make_norm_params(rope, q, k, q_norm_weight, k_norm_weight, norm_eps);
  set_outputs_in_place(p, q, k, cu_seqlens.has_value());
  launch_norm(p);
}

// Sums parts in double: many tokens make many parts.
template <typename Wide>
void sum_parts(const Wide* parts, int64_t count, int64_t stride, int64_t dims, Wide* out) {
  std::vector<double> sums(dims);
  for (int64_t part = 0; part < count; ++part) {
    for (int64_t i = 0; i < dims; ++i) sums[i] += parts[part * stride + i];
  }
  for (int64_t i = 0; i < dims; ++i) out[i] = static_cast<Wide>(sums[i]);
}

int64_t weight_dims(const RopeNormParams& p, int n) {
  const RopeNorm& norm = p.norms[n];
  if (norm.weight == nullptr) return 0;
  return p.head_dim * (norm.all_heads ? p.tensors[n].heads : 1);
}

// Writes dq and dk, and the gradients of both weights.
template <typename Wide>
void run_norm_backward(RopeNormParams& p, const Tensor (&weight_grads)[2]) {
  const int64_t count = (p.batch * p.seqlen + kPartTokens - 1) / kPartTokens;
  const int64_t dims[2] = {weight_dims(p, 0), weight_dims(p, 1)};
  p.norm_part_tokens = kPartTokens;
  p.norm_part_stride = dims[0] + dims[1];
  std::vector<Wide> parts(count * p.norm_part_stride);
  p.norm_parts[0] = parts.data(), p.norm_parts[1] = parts.data() + dims[0];
  launch_norm(p);
  for (int n = 0; n < 2; ++n) {
    sum_parts(static_cast<const Wide*>(p.norm_parts[n]), count, p.norm_part_stride, dims[n],
              static_cast<Wide*>(weight_grads[n].data_ptr()));
  }
}

// Gradients of the weights are float, or double with tensors in double; empty without weights.
EXTROPE_FUNCTION(FourTensors, norm_bwd, const Tensor& grad_q, const OptionalTensor& grad_k,
                 const Tensor& q, const OptionalTensor& k, const OptionalTensor& q_norm_weight,
                 const OptionalTensor& k_norm_weight EXTROPE_ROPE_PARAMETERS,
                 double norm_eps EXTROPE_ROPE_NUMBERS(EXTROPE_PARAMETER)) {
  const bool packed = cu_seqlens.has_value();
  const RopeParams rope = make_params(grad_q, grad_k, inv_freq, positions, EXTROPE_ROPE_OPTIONS,
                                      /*adjoint=*/true);
  RopeNormParams p = make_norm_params(rope, grad_q, grad_k, q_norm_weight, k_norm_weight, norm_eps);
  save_inputs(p, grad_q, grad_k, q, k, packed);
  const auto [dq, dk] = make_outputs("rope", p, grad_q, grad_k, packed);
  const bool wide = p.dtype == DType::f64;
  const auto type = wide ? ScalarType::Double : ScalarType::Float;
  const Tensor weight_grads[2] = {fresh(grad_q, {weight_dims(p, 0)}, type, "rope"),
                                  fresh(grad_q, {weight_dims(p, 1)}, type, "rope")};
  wide ? run_norm_backward<double>(p, weight_grads) : run_norm_backward<float>(p, weight_grads);
  return {dq, dk, weight_grads[0], weight_grads[1]};
}

}  // namespace

const Ops ops{
    EXTROPE_OP("rope_fwd", Rope::fwd),         EXTROPE_OP("rope_bwd", Rope::bwd),
    EXTROPE_OP("rope_inplace", Rope::inplace), EXTROPE_OP("rope_norm_fwd", norm_fwd),
    EXTROPE_OP("rope_norm_bwd", norm_bwd),     EXTROPE_OP("rope_norm_inplace", norm_inplace),
};

}  // namespace extrope
