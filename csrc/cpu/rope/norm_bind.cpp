// Registers the CPU kernels of the rotation with a norm before it.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "common/ops.h"
#include "common/rope_bind.h"
#include "common/rope_norm_args.h"
#include "cpu/rope/kernel.h"
#include "cpu/rope/values.h"
#include "cpu/runtime/capability.h"
#include "cpu/runtime/output_pages.h"
#include "cpu/runtime/threads.h"

namespace extrope {
namespace {

#define EXTROPE_NORM_KERNEL(isa) rope_norm_##isa

// The gradients of the weights are summed over so many tokens by one thread, whatever the number of
// threads: the bits of a sum are the same with any.
constexpr int64_t kPartTokens = 64;

void run(const RopeNormParams& p) {
  if (p.batch * p.seqlen == 0) return;
  check_values(p);
  const RopeNorms norms = EXTROPE_WIDEST(EXTROPE_NORM_KERNEL);
  const int64_t tokens = std::max<int64_t>(p.norm_part_tokens, 1);
  share_out((p.batch * p.seqlen + tokens - 1) / tokens, tokens * bytes_of_token(p),
            [&](int64_t begin, int64_t end) { norms(p, begin, end); });
}

std::tuple<Tensor, Tensor> fwd(Tensor q, OptionalTensor k, OptionalTensor q_norm_weight,
                               OptionalTensor k_norm_weight, Tensor inv_freq,
                               OptionalTensor positions, OptionalTensor cu_seqlens,
                               OptionalTensor log_decay, OptionalTensor axes, double norm_eps,
                               double attention_factor, int64_t offset, bool interleaved,
                               bool inverse, double decay_origin) {
  const bool packed = cu_seqlens.has_value();
  const RopeParams rope = make_params(
      q, k, inv_freq, positions,
      {cu_seqlens, log_decay, axes, attention_factor, offset, interleaved, inverse, decay_origin},
      /*adjoint=*/false);
  RopeNormParams p = make_norm_params(rope, q, k, q_norm_weight, k_norm_weight, norm_eps);
  Tensor out_q = fresh_like(q);
  Tensor out_k = k.has_value() ? fresh_like(*k) : no_tensor(q, dtype_code(q));
  set_output(p.tensors[0], out_q, packed);
  if (k.has_value()) set_output(p.tensors[1], out_k, packed);
  run(p);
  return {out_q, out_k};
}

void inplace(Tensor q, OptionalTensor k, OptionalTensor q_norm_weight, OptionalTensor k_norm_weight,
             Tensor inv_freq, OptionalTensor positions, OptionalTensor cu_seqlens,
             OptionalTensor log_decay, OptionalTensor axes, double norm_eps,
             double attention_factor, int64_t offset, bool interleaved, bool inverse,
             double decay_origin) {
  const bool packed = cu_seqlens.has_value();
  const RopeParams rope = make_params(
      q, k, inv_freq, positions,
      {cu_seqlens, log_decay, axes, attention_factor, offset, interleaved, inverse, decay_origin},
      /*adjoint=*/false);
  RopeNormParams p = make_norm_params(rope, q, k, q_norm_weight, k_norm_weight, norm_eps);
  refuse_overlap(q, k);
  set_output(p.tensors[0], q, packed);
  if (k.has_value()) set_output(p.tensors[1], *k, packed);
  run(p);
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

// The gradients of the weights: float, or double with tensors in double.
template <typename Wide>
std::tuple<Tensor, Tensor> run_backward(RopeNormParams& p, const Tensor& like, int32_t dtype) {
  const int64_t count = (p.batch * p.seqlen + kPartTokens - 1) / kPartTokens;
  int64_t dims[2] = {0, 0};
  for (int64_t n = 0; n < p.num_tensors; ++n) {
    const RopeNorm& norm = p.norms[n];
    if (norm.weight) dims[n] = p.head_dim * (norm.all_heads ? p.tensors[n].heads : 1);
  }
  p.norm_part_tokens = kPartTokens;
  p.norm_part_stride = dims[0] + dims[1];
  std::vector<Wide> parts(count * p.norm_part_stride);
  p.norm_parts[0] = parts.data(), p.norm_parts[1] = parts.data() + dims[0];
  run(p);
  const int64_t one = 1;
  Tensor grads[2] = {empty_strided(like, &dims[0], &one, 1, dtype),
                     empty_strided(like, &dims[1], &one, 1, dtype)};
  for (int n = 0; n < 2; ++n) {
    sum_parts(static_cast<const Wide*>(p.norm_parts[n]), count, p.norm_part_stride, dims[n],
              static_cast<Wide*>(grads[n].data_ptr()));
  }
  return {grads[0], grads[1]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bwd(
    Tensor grad_q, OptionalTensor grad_k, Tensor q, OptionalTensor k, OptionalTensor q_norm_weight,
    OptionalTensor k_norm_weight, Tensor inv_freq, OptionalTensor positions,
    OptionalTensor cu_seqlens, OptionalTensor log_decay, OptionalTensor axes, double norm_eps,
    double attention_factor, int64_t offset, bool interleaved, bool inverse, double decay_origin) {
  const bool packed = cu_seqlens.has_value();
  const RopeParams rope = make_params(
      grad_q, grad_k, inv_freq, positions,
      {cu_seqlens, log_decay, axes, attention_factor, offset, interleaved, inverse, decay_origin},
      /*adjoint=*/true);
  RopeNormParams p = make_norm_params(rope, grad_q, grad_k, q_norm_weight, k_norm_weight, norm_eps);
  save_inputs(p, grad_q, grad_k, q, k, packed);
  Tensor dq = fresh_like(grad_q);
  Tensor dk = grad_k.has_value() ? fresh_like(*grad_k) : no_tensor(grad_q, dtype_code(grad_q));
  set_output(p.tensors[0], dq, packed);
  if (grad_k.has_value()) set_output(p.tensors[1], dk, packed);
  const auto [dq_weight, dk_weight] =
      p.dtype == DType::f64 ? run_backward<double>(p, grad_q, aoti_torch_dtype_float64())
                            : run_backward<float>(p, grad_q, aoti_torch_dtype_float32());
  return {dq, dk, dq_weight, dk_weight};
}

}  // namespace

const Ops ops{
    {"rope_norm_fwd", TORCH_BOX(&fwd)},
    {"rope_norm_bwd", TORCH_BOX(&bwd)},
    {"rope_norm_inplace", TORCH_BOX(&inplace)},
};

}  // namespace extrope
