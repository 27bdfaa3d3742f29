// Checks and reads a cache's tensors, for all ops over a key/value cache: the places of rows, the
// dtype, and the scales of e4m3.
#pragma once

#include <cmath>

#include "common/kv_cache.h"
#include "common/tensor_args.h"

namespace extrope {

// The places of the rows of a cache, or of q, k and v, packed or not.
inline Plane plane(const Tensor& x) {
  const int64_t d = x.dim();
  return {x.data_ptr(), d == 4 ? x.stride(0) : 0, x.stride(d - 3), x.stride(d - 2)};
}

inline void check_cache_dtype(const char* op, const char* name, const Tensor& cache,
                              const Tensor& like, bool scaled) {
  const ScalarType type = scaled ? ScalarType::Float8_e4m3fn : like.scalar_type();
  require_of(op, cache.get_device() == like.get_device() && cache.scalar_type() == type, name,
             " must be of ",
             scaled ? "float8_e4m3fn with k_scale and v_scale" : "the other tensors' dtype",
             ", on their device");
}

inline const float* cache_scale(const char* op, const char* name, const OptionalTensor& x,
                                int64_t heads, const Tensor& like) {
  if (!x.has_value()) return nullptr;
  require_of(op,
             x->get_device() == like.get_device() && x->scalar_type() == ScalarType::Float &&
                 x->dim() == 1 && x->size(0) == heads && x->is_contiguous(),
             name, " must be contiguous float32 (", heads,
             ",) on the other tensors' device, got shape ", shape_of(*x));
  return static_cast<const float*>(x->data_ptr());
}

inline void set_cache_scales(const char* op, const OptionalTensor& k_scale,
                             const OptionalTensor& v_scale, int64_t heads, const Tensor& like,
                             KVCache& cache) {
  require_of(op, k_scale.has_value() == v_scale.has_value(),
             "k_scale and v_scale must be given together");
  cache.k_scale = cache_scale(op, "k_scale", k_scale, heads, like);
  cache.v_scale = cache_scale(op, "v_scale", v_scale, heads, like);
}

// For scales that the host can read.
inline void check_cache_scales(const char* op, const KVCache& cache) {
  const auto check = [&](const char* name, const float* scale) {
    for (int64_t head = 0; scale && head < cache.heads; ++head) {
      require_of(op, scale[head] > 0 && std::isfinite(scale[head]), name,
                 " must be positive numbers, got ", scale[head]);
    }
  };
  check("k_scale", cache.k_scale), check("v_scale", cache.v_scale);
}

}  // namespace extrope
