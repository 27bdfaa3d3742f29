// The scales of a cache of e4m3, with every check.
#pragma once

#include "common/tensor_args.h"
#include "cpu/append/cache.h"

namespace extrope {

inline void check_cache_dtype(const char* op, const char* name, const Tensor& cache,
                              const Tensor& like, bool scaled) {
  const ScalarType type = scaled ? ScalarType::Float8_e4m3fn : like.scalar_type();
  require_of(op, cache.is_cpu() && cache.scalar_type() == type, name, " must be of ",
             scaled ? "float8_e4m3fn with k_scale and v_scale" : "the other tensors' dtype",
             ", on the CPU");
}

inline const float* scale_of(const char* op, const char* name, const OptionalTensor& x,
                             int64_t heads) {
  if (!x.has_value()) return nullptr;
  require_of(op,
             x->is_cpu() && x->scalar_type() == ScalarType::Float && x->dim() == 1 &&
                 x->size(0) == heads && x->is_contiguous(),
             name, " must be contiguous float32 (", heads, ",) on the CPU, got shape ",
             shape_of(*x));
  return static_cast<const float*>(x->data_ptr());
}

inline void set_scales(const char* op, const OptionalTensor& k_scale, const OptionalTensor& v_scale,
                       int64_t heads, KVCache& cache) {
  require_of(op, k_scale.has_value() == v_scale.has_value(),
             "k_scale and v_scale must be given together");
  cache.k_scale = scale_of(op, "k_scale", k_scale, heads);
  cache.v_scale = scale_of(op, "v_scale", v_scale, heads);
}

}  // namespace extrope
