// What ops of attention, with and without a cache, check alike of their frequencies and numbers.
#pragma once

#include <cmath>
#include <optional>

#include "common/regions_args.h"

namespace extrope {

inline void check_frequencies(const char* op, int64_t head_dim, int64_t sequences,
                              const Tensor& inv_freq, const OptionalTensor& log_decay) {
  const int64_t dim = inv_freq.dim(), half = dim >= 1 ? inv_freq.size(dim - 1) : 0;
  const ScalarType type = inv_freq.scalar_type();
  require_of(
      op,
      (type == ScalarType::Float || type == ScalarType::Double) && inv_freq.is_cpu() &&
          (dim == 1 || (dim == 2 && (inv_freq.size(0) == 1 || inv_freq.size(0) == sequences))) &&
          half >= 1 && 2 * half <= head_dim && (half == 1 || inv_freq.stride(dim - 1) == 1),
      "inv_freq must be float32 or float64 (rotary_dim/2,) or (", sequences,
      ", rotary_dim/2), up to head_dim/2 = ", head_dim / 2, " contiguous frequencies, got shape ",
      shape_of(inv_freq));
  if (!log_decay.has_value()) return;
  require_of(op,
             log_decay->scalar_type() == ScalarType::Float && log_decay->dim() == 1 &&
                 log_decay->size(0) == half && log_decay->is_contiguous() && log_decay->is_cpu(),
             "log_decay must be contiguous float32 (", half, ",), got shape ",
             shape_of(*log_decay));
}

inline double softmax_scale_of(const char* op, std::optional<double> softmax_scale,
                               int64_t head_dim) {
  const double scale = softmax_scale.value_or(1.0 / std::sqrt(static_cast<double>(head_dim)));
  require_of(op, scale > 0 && std::isfinite(scale),
             "softmax_scale must be None or a number > 0, got ", scale);
  return scale;
}

inline void check_scales(const char* op, std::optional<double> log_n, double attention_factor) {
  const double length = log_n.value_or(2.0);
  require_of(op, length > 1 && std::isfinite(length), "log_n must be None or a length > 1, got ",
             length);
  require_of(op, attention_factor > 0 && std::isfinite(attention_factor),
             "attention_factor must be > 0, got ", attention_factor);
}

}  // namespace extrope
