// Converts torch tensors to RopeParams and RopeNormParams with all checks, for the CPU and the CUDA
// library.
#pragma once

#include <cmath>
#include <optional>

#include "common/ops.h"
#include "common/rope_params.h"
#include "common/tensor_args.h"

namespace extrope {

template <typename... Message>
void require_rope(bool condition, const Message&... message) {
  require_of("rope", condition, message...);
}

// What every op's function is given for the rotation, as in extrope_kernels/ops/rope/op.py:
// inv_freq and positions, then these, and at its end numbers.
#define EXTROPE_ROPE_TENSORS(X)        \
  X(const OptionalTensor&, cu_seqlens) \
  X(const OptionalTensor&, log_decay)  \
  X(const OptionalTensor&, axes)
#define EXTROPE_ROPE_NUMBERS(X)            \
  X(double, attention_factor)              \
  X(std::optional<int64_t>, offset)        \
  X(bool, interleaved)                     \
  X(std::optional<int64_t>, rotary_offset) \
  X(bool, inverse)                         \
  X(double, decay_origin)
#define EXTROPE_ROPE_PARAMETERS \
  , const Tensor &inv_freq, const OptionalTensor &positions EXTROPE_ROPE_TENSORS(EXTROPE_PARAMETER)
#define EXTROPE_ROPE_OPTIONS \
  RopeOptions { EXTROPE_ROPE_TENSORS(EXTROPE_VALUE) EXTROPE_ROPE_NUMBERS(EXTROPE_VALUE) }

struct RopeOptions {
  EXTROPE_ROPE_TENSORS(EXTROPE_MEMBER)
  EXTROPE_ROPE_NUMBERS(EXTROPE_MEMBER)
  bool packed = false;  // (total, heads, head_dim) without cu_seqlens too
};

inline DType rotated_dtype(const Tensor& x, const char* name) {
  return dtype_of_rows("rope", x, name);
}

inline void set_frequencies(RopeParams& p, const Tensor& inv_freq, const Tensor& q,
                            int64_t sequences) {
  const ScalarType type = inv_freq.scalar_type();
  require_rope(type == ScalarType::Float || type == ScalarType::Double,
               "inv_freq must be float32 or float64");
  require_rope(inv_freq.get_device() == q.get_device(), "inv_freq must be on q's device");
  const int64_t dim = inv_freq.dim(), heads = p.tensors[0].heads;
  const int64_t rows = dim >= 2 ? inv_freq.size(0) : 1, columns = dim == 3 ? inv_freq.size(1) : 1;
  require_rope(dim >= 1 && dim <= 3 && (rows == 1 || rows == sequences) && columns >= 1 &&
                   (columns == 1 || columns == heads),
               "inv_freq must be (rotary_dim/2,), (", sequences, ", rotary_dim/2) or (", sequences,
               " or 1, ", heads, " or 1, rotary_dim/2), got ", shape_of(inv_freq));
  const int64_t half = inv_freq.size(dim - 1);
  require_rope(half >= 1 && half <= p.head_dim / 2,
               "inv_freq must hold between 1 and head_dim/2 = ", p.head_dim / 2,
               " frequencies, got ", half);
  require_rope(half == 1 || inv_freq.stride(dim - 1) == 1 || inv_freq.numel() == 0,
               "inv_freq must be contiguous in its last dimension");
  require_rope(columns == 1 || p.num_tensors == 1 || p.tensors[1].heads == heads,
               "frequencies per head need as many k heads as q heads (", heads,
               "); rotate q and k in two calls");
  p.inv_freq = inv_freq.data_ptr();
  p.inv_freq_is_f64 = type == ScalarType::Double;
  p.freq_batch = rows > 1 ? inv_freq.stride(0) : 0;
  p.freq_head = columns > 1 ? inv_freq.stride(1) : 0;
  p.rotary_dim = 2 * half;
  p.angle_heads = columns;
}

inline void set_rotary_offset(RopeParams& p, int64_t rotary_offset) {
  require_rope(0 <= rotary_offset && rotary_offset <= p.head_dim - p.rotary_dim,
               "rotary_offset must be from 0 to head_dim - rotary_dim = ",
               p.head_dim - p.rotary_dim, ", got ", rotary_offset);
  p.rotary_offset = rotary_offset;
}

inline PositionType position_type(const Tensor& positions) {
  switch (positions.scalar_type()) {
    case ScalarType::Int:
      return PositionType::i32;
    case ScalarType::Long:
      return PositionType::i64;
    case ScalarType::Float:
      return PositionType::f32;
    case ScalarType::Double:
      return PositionType::f64;
    default:
      require_rope(false, "positions must be int32, int64, float32 or float64");
  }
  return PositionType::i64;
}

inline void check_axes(const RopeParams& p, const Tensor& axes, const Tensor& q) {
  require_rope(axes.scalar_type() == ScalarType::Int && axes.dim() == 1 &&
                   axes.size(0) == p.rotary_dim / 2 && axes.is_contiguous() &&
                   axes.get_device() == q.get_device(),
               "axes must be contiguous int32 (", p.rotary_dim / 2, ",) on q's device, got shape ",
               shape_of(axes));
}

// Without a table of positions per axis, all axes have the same positions.
inline void set_positions(RopeParams& p, const Tensor& positions, const OptionalTensor& axes,
                          const Tensor& q, int64_t sequences) {
  p.position_type = position_type(positions);
  require_rope(positions.get_device() == q.get_device(), "positions must be on q's device");
  if (set_positions(p, positions, sequences)) return;
  const int64_t rows = positions.dim() == 3 ? positions.size(0) : 0;
  require_rope(axes.has_value() && rows >= 1 &&
                   (positions.size(1) == p.batch || positions.size(1) == 1) &&
                   positions.size(2) == p.seqlen,
               "positions must be (", p.seqlen, ",), (", p.batch, ", ", p.seqlen, "), (", sequences,
               ",) offsets or, with axes, (axes, ", p.batch, ", ", p.seqlen, "), got shape ",
               shape_of(positions));
  p.axes = static_cast<const int32_t*>(axes->data_ptr());
  p.num_axes = rows;
  p.position_axis = rows > 1 ? positions.stride(0) : 0;
  p.position_batch = positions.size(1) > 1 ? positions.stride(1) : 0;
  p.position_seq = positions.stride(2);
}

inline void set_log_decay(RopeParams& p, const Tensor& log_decay, const Tensor& q) {
  require_rope(log_decay.scalar_type() == ScalarType::Float && log_decay.dim() == 1 &&
                   log_decay.size(0) == p.rotary_dim / 2 && log_decay.is_contiguous() &&
                   log_decay.get_device() == q.get_device(),
               "log_decay must be contiguous float32 (", p.rotary_dim / 2,
               ",) on q's device, got shape ", shape_of(log_decay));
  p.log_decay = static_cast<const float*>(log_decay.data_ptr());
}

inline void set_saved(RopeTensor& t, const Tensor& saved, bool packed) {
  const int64_t d = saved.dim();
  t.saved = saved.data_ptr();
  t.saved_batch = packed ? 0 : saved.stride(0);
  t.saved_seq = saved.stride(d - 3);
  t.saved_head = saved.stride(d - 2);
}

inline void set_tensors(RopeParams& p, const Tensor& q, const OptionalTensor& k, bool packed) {
  p.dtype = rotated_dtype(q, "q");
  check_rows("rope", q, packed, "q");
  set_input(p.tensors[p.num_tensors++], q, packed);
  if (k.has_value()) {
    check_rows("rope", *k, packed, "k");
    check_matching("rope", *k, q, "k");
    set_input(p.tensors[p.num_tensors++], *k, packed);
  }
  p.batch = packed ? 1 : q.size(0);
  p.seqlen = q.size(packed ? 0 : 1);
  p.head_dim = q.size(q.dim() - 1);
}

inline RopeParams make_params(const Tensor& q, const OptionalTensor& k, const Tensor& inv_freq,
                              const OptionalTensor& positions, const RopeOptions& options,
                              bool adjoint) {
  RopeParams p{};
  const bool packed = options.packed || options.cu_seqlens.has_value();
  set_tensors(p, q, k, packed);
  const int64_t sequences =
      options.cu_seqlens.has_value() ? set_cu_seqlens("rope", p, *options.cu_seqlens, q) : p.batch;
  set_frequencies(p, inv_freq, q, sequences);
  set_rotary_offset(p, options.rotary_offset.value_or(0));
  if (options.axes.has_value()) check_axes(p, *options.axes, q);
  if (positions.has_value()) set_positions(p, *positions, options.axes, q, sequences);
  if (options.log_decay.has_value()) set_log_decay(p, *options.log_decay, q);
  require_rope(options.attention_factor > 0 && std::isfinite(options.attention_factor),
               "attention_factor must be > 0 and finite, got ", options.attention_factor);
  const double sign = options.inverse ? -1.0 : 1.0;
  p.tensors[0].decay_sign = sign;
  p.tensors[1].decay_sign = -sign;
  p.amplitude = options.inverse ? 1.0 / options.attention_factor : options.attention_factor;
  p.conjugate = adjoint != options.inverse;
  p.interleaved = options.interleaved;
  p.offset = options.offset.value_or(0);
  require_rope(-kFarthestPosition <= p.offset && p.offset <= kFarthestPosition,
               "an offset of positions must be within 2**53, got ", p.offset);
  require_rope(std::isfinite(options.decay_origin), "decay_origin must be finite, got ",
               options.decay_origin);
  p.decay_origin = options.decay_origin;
  return p;
}

inline RopeNorm norm_of(const OptionalTensor& weight, const Tensor& x, const char* name) {
  RopeNorm norm{};
  if (!weight.has_value()) return norm;
  const int64_t dim = x.size(x.dim() - 1), heads = x.size(x.dim() - 2);
  const bool one = weight->dim() == 1 && weight->size(0) == dim;
  require_rope(one || (weight->dim() == 1 && weight->size(0) == heads * dim), name, " must be (",
               dim, ",) to norm each head or (", heads * dim, ",) to norm all together, got shape ",
               shape_of(*weight));
  require_rope(weight->get_device() == x.get_device() && weight->is_contiguous(), name,
               " must be contiguous on q's device");
  norm.weight = weight->data_ptr();
  norm.weight_dtype = rotated_dtype(*weight, name);
  norm.all_heads = !one;
  return norm;
}

inline RopeNormParams make_norm_params(const RopeParams& rope, const Tensor& q,
                                       const OptionalTensor& k, const OptionalTensor& q_norm_weight,
                                       const OptionalTensor& k_norm_weight, double norm_eps) {
  RopeNormParams p{};
  static_cast<RopeParams&>(p) = rope;
  p.norms[0] = norm_of(q_norm_weight, q, "q_norm_weight");
  require_rope(!k_norm_weight.has_value() || k.has_value(), "k_norm_weight needs a k");
  if (k.has_value()) p.norms[1] = norm_of(k_norm_weight, *k, "k_norm_weight");
  require_rope(norm_eps >= 0, "norm_eps must be >= 0, got ", norm_eps);
  p.norm_eps = norm_eps;
  return p;
}

// Checks the values, for a library that can read them.
inline void check_axes_of_pairs(const RopeParams& p) {
  for (int64_t i = 0; p.axes && i < p.rotary_dim / 2; ++i) {
    require_rope(0 <= p.axes[i] && p.axes[i] < p.num_axes, "axes must be from 0 to ",
                 p.num_axes - 1, " for positions of ", p.num_axes, " axes, got ", p.axes[i]);
  }
}

template <typename Number>
void check_positions(const RopeParams& p) {
  const Number* positions = static_cast<const Number*>(p.positions);
  const int64_t axes = p.axes ? p.num_axes : 1;
  const int64_t rows = p.positions_are_offsets ? (p.cu_seqlens ? p.num_sequences : p.batch)
                       : p.position_batch != 0 ? p.batch
                                               : 1;
  const int64_t columns = p.positions_are_offsets ? 1 : p.seqlen;
  for (int64_t n = 0; n < axes * rows * columns; ++n) {
    const int64_t axis = n / columns / rows, row = n / columns % rows, column = n % columns;
    const Number position =
        positions[axis * p.position_axis + row * p.position_batch + column * p.position_seq];
    const bool far = position > kFarthestPosition || position < -kFarthestPosition;
    require_rope(!far, "positions must be within 2**53, got ", position);
  }
}

// NaN is no position too far: it makes NaN.
inline void check_positions(const RopeParams& p) {
  if (p.positions == nullptr) return;
  if (p.position_type == PositionType::i64) check_positions<int64_t>(p);
  if (p.position_type == PositionType::f32) check_positions<float>(p);
  if (p.position_type == PositionType::f64) check_positions<double>(p);
}

inline void check_values(const RopeParams& p) {
  if (p.cu_seqlens) check_boundaries("rope", p, p.seqlen);
  check_axes_of_pairs(p);
  check_positions(p);
}

}  // namespace extrope
