// The ops of the rotation on torch tensors, for the CPU and the CUDA library alike.
//
// The schemas are defined in Python (extrope_kernels/ops/rope/schema.py); a library registers
// RopeOps<launch> for its device, where launch(params, device_index) runs the kernel; `make_like`
// makes the tensors for large results.
#pragma once

#include <tuple>

#include "common/outputs.h"
#include "common/rope_args.h"

namespace extrope {

inline void check_saved(const Tensor& x, const Tensor& grad, bool packed, const char* name) {
  check_rows("rope", x, packed, name);
  check_matching("rope", x, grad, name);
  require(x.size(x.dim() - 2) == grad.size(x.dim() - 2), name, " must have its gradient's shape ",
          shape_of(grad), ", got ", shape_of(x));
}

inline void save_inputs(RopeParams& p, const Tensor& grad_q, const OptionalTensor& grad_k,
                        const Tensor& q, const OptionalTensor& k, bool packed) {
  check_saved(q, grad_q, packed, "q");
  set_saved(p.tensors[0], q, packed);
  require(k.has_value() == grad_k.has_value(), "k must be given with grad_k and q, or not at all");
  if (k.has_value()) {
    check_saved(*k, *grad_k, packed, "k");
    set_saved(p.tensors[1], *k, packed);
  }
}

inline void refuse_overlap(const Tensor& q, const OptionalTensor& k) {
  require(!overlaps_itself(q), "q must not be expanded to be rotated in place");
  require(!k.has_value() || !overlaps_itself(*k), "k must not be expanded to be rotated in place");
}

// The three ops, for a device whose kernel is started by `launch`.
template <void (*launch)(const RopeParams&, int device_index),
          Tensor (*make_like)(const Tensor&) = new_like>
struct RopeOps {
  static void run(const RopeParams& p, const Tensor& q) {
    if (p.batch * p.seqlen > 0) launch(p, q.get_device());
  }

  static std::tuple<Tensor, Tensor> fwd(const Tensor& q, const OptionalTensor& k,
                                        const Tensor& inv_freq, const OptionalTensor& positions,
                                        const OptionalTensor& cu_seqlens,
                                        const OptionalTensor& log_decay, const OptionalTensor& axes,
                                        double attention_factor, int64_t offset, bool interleaved,
                                        bool inverse, double decay_origin) {
    const bool packed = cu_seqlens.has_value();
    RopeParams p = make_params(
        q, k, inv_freq, positions,
        {cu_seqlens, log_decay, axes, attention_factor, offset, interleaved, inverse, decay_origin},
        /*adjoint=*/false);
    const std::tuple<Tensor, Tensor> outs = make_outputs<make_like>(p, q, k, packed);
    run(p, q);
    return outs;
  }

  static std::tuple<Tensor, Tensor, Tensor> bwd(
      const Tensor& grad_q, const OptionalTensor& grad_k, const OptionalTensor& q,
      const OptionalTensor& k, const Tensor& inv_freq, const OptionalTensor& positions,
      const OptionalTensor& cu_seqlens, const OptionalTensor& log_decay, const OptionalTensor& axes,
      double attention_factor, int64_t offset, bool interleaved, bool inverse,
      double decay_origin) {
    const bool packed = cu_seqlens.has_value();
    RopeParams p = make_params(
        grad_q, grad_k, inv_freq, positions,
        {cu_seqlens, log_decay, axes, attention_factor, offset, interleaved, inverse, decay_origin},
        /*adjoint=*/true);
    const auto [dq, dk] = make_outputs<make_like>(p, grad_q, grad_k, packed);
    const int32_t wide =
        p.dtype == DType::f64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
    Tensor angle_grad = q.has_value() ? new_angle_grad(p, grad_q, wide) : no_tensor(grad_q, wide);
    if (q.has_value()) {
      save_inputs(p, grad_q, grad_k, *q, k, packed);
      p.angle_grad = angle_grad.data_ptr();
    }
    run(p, grad_q);
    return {dq, dk, angle_grad};
  }

  static Tensor new_angle_grad(const RopeParams& p, const Tensor& like, int32_t dtype) {
    const int64_t half = p.rotary_dim / 2, heads = p.angle_heads;
    const int64_t sizes[] = {p.batch, p.seqlen, heads, half};
    const int64_t strides[] = {p.seqlen * heads * half, heads * half, half, 1};
    return empty_strided(like, sizes, strides, 4, dtype);
  }

  static void inplace(const Tensor& q, const OptionalTensor& k, const Tensor& inv_freq,
                      const OptionalTensor& positions, const OptionalTensor& cu_seqlens,
                      const OptionalTensor& log_decay, const OptionalTensor& axes,
                      double attention_factor, int64_t offset, bool interleaved, bool inverse,
                      double decay_origin) {
    const bool packed = cu_seqlens.has_value();
    RopeParams p = make_params(
        q, k, inv_freq, positions,
        {cu_seqlens, log_decay, axes, attention_factor, offset, interleaved, inverse, decay_origin},
        /*adjoint=*/false);
    refuse_overlap(q, k);
    set_output(p.tensors[0], q, packed);
    if (k.has_value()) set_output(p.tensors[1], *k, packed);
    run(p, q);
  }
};

}  // namespace extrope
