// What a norm before the rotation adds to RopeParams, checked and read from torch tensors.
#pragma once

#include "common/rope_args.h"
#include "common/rope_norm_params.h"

namespace extrope {

inline RopeNorm norm_of(const OptionalView& weight, const TensorView& x, const char* name) {
  RopeNorm norm{};
  if (!weight.has_value()) return norm;
  const int64_t dim = x.size(x.dim() - 1), heads = x.size(x.dim() - 2);
  const bool one = weight->dim() == 1 && weight->size(0) == dim;
  require(one || (weight->dim() == 1 && weight->size(0) == heads * dim), name, " must be (", dim,
          ",) to norm each head or (", heads * dim, ",) to norm all together, got shape ",
          shape_of(*weight));
  require(weight->get_device() == x.get_device() && weight->is_contiguous(), name,
          " must be contiguous on q's device");
  norm.weight = weight->data_ptr();
  norm.weight_dtype = rotated_dtype(*weight, name);
  norm.all_heads = !one;
  return norm;
}

inline RopeNormParams make_norm_params(const RopeParams& rope, const TensorView& q,
                                       const OptionalView& k, const OptionalView& q_norm_weight,
                                       const OptionalView& k_norm_weight, double norm_eps) {
  RopeNormParams p{};
  static_cast<RopeParams&>(p) = rope;
  p.norms[0] = norm_of(q_norm_weight, q, "q_norm_weight");
  require(!k_norm_weight.has_value() || k.has_value(), "k_norm_weight needs a k");
  if (k.has_value()) p.norms[1] = norm_of(k_norm_weight, *k, "k_norm_weight");
  require(norm_eps >= 0, "norm_eps must be >= 0, got ", norm_eps);
  p.norm_eps = norm_eps;
  return p;
}

}  // namespace extrope
