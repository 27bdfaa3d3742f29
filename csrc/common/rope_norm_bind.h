// The ops of the rotation with a norm before it on torch tensors, for the CPU and the CUDA library
// alike.
//
// The schemas are defined in Python (extrope_kernels/ops/rope/norm_schema.py); a library registers
// RopeNormOps<launch, backward> for its device. launch(params, device_index) runs the forward;
// backward(params, like) runs the backward, whose gradients of the weights it makes on like's
// device and returns.
#pragma once

#include <tuple>

#include "common/rope_bind.h"
#include "common/rope_norm_args.h"

namespace extrope {

// The gradients of the weights, float or, with tensors in double, double; empty without weights.
struct WeightGrads {
  int64_t dims[2];
  int32_t dtype;
  Tensor of_q, of_k;

  WeightGrads(const RopeNormParams& p, const Tensor& like)
      : dims{dims_of(p, 0), dims_of(p, 1)},
        dtype(p.dtype == DType::f64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32()),
        of_q(new_row(like, dims[0])),
        of_k(new_row(like, dims[1])) {}

  Tensor new_row(const Tensor& like, int64_t size) const {
    const int64_t one = 1;
    return empty_strided(like, &size, &one, 1, dtype);
  }

  static int64_t dims_of(const RopeNormParams& p, int n) {
    const RopeNorm& norm = p.norms[n];
    if (norm.weight == nullptr) return 0;
    return p.head_dim * (norm.all_heads ? p.tensors[n].heads : 1);
  }
};

template <void (*launch)(const RopeNormParams&, int device_index),
          WeightGrads (*backward)(RopeNormParams&, const Tensor& like),
          Tensor (*make_like)(const Tensor&) = new_like>
struct RopeNormOps {
  static void run(const RopeNormParams& p, const Tensor& q) {
    if (p.batch * p.seqlen > 0) launch(p, q.get_device());
  }

  static std::tuple<Tensor, Tensor> fwd(const Tensor& q, const OptionalTensor& k,
                                        const OptionalTensor& q_norm_weight,
                                        const OptionalTensor& k_norm_weight, const Tensor& inv_freq,
                                        const OptionalTensor& positions,
                                        const OptionalTensor& cu_seqlens,
                                        const OptionalTensor& log_decay, const OptionalTensor& axes,
                                        double norm_eps, double attention_factor, int64_t offset,
                                        bool interleaved, bool inverse, double decay_origin) {
    const bool packed = cu_seqlens.has_value();
    const RopeParams rope = make_params(
        q, k, inv_freq, positions,
        {cu_seqlens, log_decay, axes, attention_factor, offset, interleaved, inverse, decay_origin},
        /*adjoint=*/false);
    RopeNormParams p = make_norm_params(rope, q, k, q_norm_weight, k_norm_weight, norm_eps);
    const std::tuple<Tensor, Tensor> outs = make_outputs<make_like>(p, q, k, packed);
    run(p, q);
    return outs;
  }

  static void inplace(const Tensor& q, const OptionalTensor& k, const OptionalTensor& q_norm_weight,
                      const OptionalTensor& k_norm_weight, const Tensor& inv_freq,
                      const OptionalTensor& positions, const OptionalTensor& cu_seqlens,
                      const OptionalTensor& log_decay, const OptionalTensor& axes, double norm_eps,
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
    run(p, q);
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> bwd(
      const Tensor& grad_q, const OptionalTensor& grad_k, const Tensor& q, const OptionalTensor& k,
      const OptionalTensor& q_norm_weight, const OptionalTensor& k_norm_weight,
      const Tensor& inv_freq, const OptionalTensor& positions, const OptionalTensor& cu_seqlens,
      const OptionalTensor& log_decay, const OptionalTensor& axes, double norm_eps,
      double attention_factor, int64_t offset, bool interleaved, bool inverse,
      double decay_origin) {
    const bool packed = cu_seqlens.has_value();
    const RopeParams rope = make_params(
        grad_q, grad_k, inv_freq, positions,
        {cu_seqlens, log_decay, axes, attention_factor, offset, interleaved, inverse, decay_origin},
        /*adjoint=*/true);
    RopeNormParams p =
        make_norm_params(rope, grad_q, grad_k, q_norm_weight, k_norm_weight, norm_eps);
    save_inputs(p, grad_q, grad_k, q, k, packed);
    const auto [dq, dk] = make_outputs<make_like>(p, grad_q, grad_k, packed);
    const WeightGrads grads = backward(p, grad_q);
    return {dq, dk, grads.of_q, grads.of_k};
  }
};

}  // namespace extrope
