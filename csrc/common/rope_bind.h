// The ops of the rotation on torch tensors, for the CPU and the CUDA library.
//
// The schemas are defined in Python (extrope_kernels/ops/rope/op.py); a library registers
// RopeOps<launch> for its device, where launch(params, device_index) runs the kernel.
#pragma once

#include <tuple>
#include <vector>

#include "common/outputs.h"
#include "common/rope_args.h"

namespace extrope {

inline void check_saved(const Tensor& x, const Tensor& grad, bool packed, const char* name) {
  check_rows("rope", x, packed, name);
  check_matching("rope", x, grad, name);
  require_rope(x.size(x.dim() - 2) == grad.size(x.dim() - 2), name,
               " must have its gradient's shape ", shape_of(grad), ", got ", shape_of(x));
}

inline void save_inputs(RopeParams& p, const Tensor& grad_q, const OptionalTensor& grad_k,
                        const OptionalTensor& q, const OptionalTensor& k, bool packed) {
  require_rope(k.has_value() == (q.has_value() && grad_k.has_value()),
               "k must be given with grad_k and q, or not at all");
  if (!q.has_value()) return;
  check_saved(*q, grad_q, packed, "q");
  set_saved(p.tensors[0], *q, packed);
  if (k.has_value()) {
    check_saved(*k, *grad_k, packed, "k");
    set_saved(p.tensors[1], *k, packed);
  }
}

inline void refuse_overlap(const Tensor& q, const OptionalTensor& k) {
  require_rope(!overlaps_itself(q), "q must not be expanded to be rotated in place");
  require_rope(!k.has_value() || !overlaps_itself(*k),
               "k must not be expanded to be rotated in place");
  require_rope(!k.has_value() || !share_memory(q, *k),
               "inplace=True needs q and k of their own, got two that share memory");
}

inline void set_outputs_in_place(RopeParams& p, const Tensor& q, const OptionalTensor& k,
                                 bool packed) {
  refuse_overlap(q, k);
  set_output(p.tensors[0], q, packed);
  if (k.has_value()) set_output(p.tensors[1], *k, packed);
}

// The three ops of a device; `launch` starts its kernel.
template <void (*launch)(const RopeParams&, int device_index)>
struct RopeOps {
  EXTROPE_FUNCTION(TwoTensors, fwd, const Tensor& q,
                   const OptionalTensor& k EXTROPE_ROPE_PARAMETERS
                       EXTROPE_ROPE_NUMBERS(EXTROPE_PARAMETER)) {
    const bool packed = cu_seqlens.has_value();
    RopeParams p = make_params(q, k, inv_freq, positions, EXTROPE_ROPE_OPTIONS,
                               /*adjoint=*/false);
    const std::tuple<Tensor, Tensor> outs = make_outputs("rope", p, q, k, packed);
    launch(p, q.get_device());
    return outs;
  }

  EXTROPE_FUNCTION(ThreeTensors, bwd, const Tensor& grad_q, const OptionalTensor& grad_k,
                   const OptionalTensor& q,
                   const OptionalTensor& k EXTROPE_ROPE_PARAMETERS
                       EXTROPE_ROPE_NUMBERS(EXTROPE_PARAMETER)) {
    const bool packed = cu_seqlens.has_value();
    RopeParams p = make_params(grad_q, grad_k, inv_freq, positions, EXTROPE_ROPE_OPTIONS,
                               /*adjoint=*/true);
    const auto [dq, dk] = make_outputs("rope", p, grad_q, grad_k, packed);
    const ScalarType wide = p.dtype == DType::f64 ? ScalarType::Double : ScalarType::Float;
    std::vector<int64_t> angles{0};
    if (q.has_value()) angles = {p.batch, p.seqlen, p.angle_heads, p.rotary_dim / 2};
    const Tensor angle_grad = fresh(grad_q, angles, wide, "rope");
    save_inputs(p, grad_q, grad_k, q, k, packed);
    if (q.has_value()) p.angle_grad = angle_grad.data_ptr();
    launch(p, grad_q.get_device());
    return {dq, dk, angle_grad};
  }

  EXTROPE_FUNCTION(void, inplace, const Tensor& q,
                   const OptionalTensor& k EXTROPE_ROPE_PARAMETERS
                       EXTROPE_ROPE_NUMBERS(EXTROPE_PARAMETER)) {
    const bool packed = cu_seqlens.has_value();
    RopeParams p = make_params(q, k, inv_freq, positions, EXTROPE_ROPE_OPTIONS,
                               /*adjoint=*/false);
    set_outputs_in_place(p, q, k, packed);
    launch(p, q.get_device());
  }
};

}  // namespace extrope
