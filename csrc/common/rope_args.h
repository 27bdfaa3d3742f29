// From torch tensors to RopeParams, with every check: the torch side of the CPU and the CUDA
// library.
//
// The schemas are defined in Python (extrope_kernels/ops/rope/schema.py); a library registers
// RopeOps<launch> for its device, where launch(params, device_index) runs the kernel.
#pragma once

#include "common/rope_params.h"
#include "common/tensor_args.h"

namespace extrope {

template <typename... Message>
void require(bool condition, const Message&... message) {
  require_of("rope", condition, message...);
}

struct RopeOptions {
  OptionalView cu_seqlens, log_decay, axes;
  double attention_factor;
  int64_t offset;
  bool interleaved, inverse;
  double decay_origin;
  bool packed = false;  // (total, heads, head_dim) without cu_seqlens too
};

inline DType rotated_dtype(const TensorView& x, const char* name) {
  return dtype_of_rows("rope", x, name);
}

inline void set_frequencies(RopeParams& p, const TensorView& inv_freq, const TensorView& q,
                            int64_t sequences) {
  const ScalarType type = inv_freq.scalar_type();
  require(type == ScalarType::Float || type == ScalarType::Double,
          "inv_freq must be float32 or float64");
  require(inv_freq.get_device() == q.get_device(), "inv_freq must be on q's device");
  const int64_t dim = inv_freq.dim(), heads = p.tensors[0].heads;
  const int64_t rows = dim >= 2 ? inv_freq.size(0) : 1, columns = dim == 3 ? inv_freq.size(1) : 1;
  require(dim >= 1 && dim <= 3 && (rows == 1 || rows == sequences) &&
              (columns == 1 || columns == heads),
          "inv_freq must be (rotary_dim/2,), (", sequences, ", rotary_dim/2) or (", sequences,
          " or 1, ", heads, " or 1, rotary_dim/2), got ", shape_of(inv_freq));
  const int64_t half = inv_freq.size(dim - 1);
  require(half >= 1 && half <= p.head_dim / 2,
          "inv_freq must hold between 1 and head_dim/2 = ", p.head_dim / 2, " frequencies, got ",
          half);
  require(half == 1 || inv_freq.stride(dim - 1) == 1 || inv_freq.numel() == 0,
          "inv_freq must be contiguous in its last dimension");
  require(columns == 1 || p.num_tensors == 1 || p.tensors[1].heads == heads,
          "frequencies per head need as many k heads as q heads (", heads,
          "); rotate q and k in two calls");
  p.inv_freq = inv_freq.data_ptr();
  p.inv_freq_is_f64 = type == ScalarType::Double;
  p.freq_batch = rows > 1 ? inv_freq.stride(0) : 0;
  p.freq_head = columns > 1 ? inv_freq.stride(1) : 0;
  p.rotary_dim = 2 * half;
  p.angle_heads = columns;
}

inline PositionType position_type(const TensorView& positions) {
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
      require(false, "positions must be int32, int64, float32 or float64");
  }
  return PositionType::i64;
}

inline void check_axes(const RopeParams& p, const TensorView& axes, const TensorView& q) {
  require(axes.scalar_type() == ScalarType::Int && axes.dim() == 1 &&
              axes.size(0) == p.rotary_dim / 2 && axes.is_contiguous() &&
              axes.get_device() == q.get_device(),
          "axes must be contiguous int32 (", p.rotary_dim / 2, ",) on q's device, got shape ",
          shape_of(axes));
}

// Without a table of positions for each axis, the axes are all alike.
inline void set_positions(RopeParams& p, const TensorView& positions, const OptionalView& axes,
                          const TensorView& q, int64_t sequences) {
  p.position_type = position_type(positions);
  require(positions.get_device() == q.get_device(), "positions must be on q's device");
  if (set_positions(p, positions, sequences)) return;
  const int64_t rows = positions.dim() == 3 ? positions.size(0) : 0;
  require(axes.has_value() && rows >= 1 &&
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

inline void set_log_decay(RopeParams& p, const TensorView& log_decay, const TensorView& q) {
  require(log_decay.scalar_type() == ScalarType::Float && log_decay.dim() == 1 &&
              log_decay.size(0) == p.rotary_dim / 2 && log_decay.is_contiguous() &&
              log_decay.get_device() == q.get_device(),
          "log_decay must be contiguous float32 (", p.rotary_dim / 2,
          ",) on q's device, got shape ", shape_of(log_decay));
  p.log_decay = static_cast<const float*>(log_decay.data_ptr());
}

inline void set_saved(RopeTensor& t, const TensorView& saved, bool packed) {
  const int64_t d = saved.dim();
  t.saved = saved.data_ptr();
  t.saved_batch = packed ? 0 : saved.stride(0);
  t.saved_seq = saved.stride(d - 3);
  t.saved_head = saved.stride(d - 2);
}

inline void set_tensors(RopeParams& p, const TensorView& q, const OptionalView& k, bool packed) {
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

inline RopeParams make_params(const TensorView& q, const OptionalView& k,
                              const TensorView& inv_freq, const OptionalView& positions,
                              const RopeOptions& options, bool adjoint) {
  RopeParams p{};
  const bool packed = options.packed || options.cu_seqlens.has_value();
  set_tensors(p, q, k, packed);
  const int64_t sequences =
      options.cu_seqlens.has_value() ? set_cu_seqlens("rope", p, *options.cu_seqlens, q) : p.batch;
  set_frequencies(p, inv_freq, q, sequences);
  if (options.axes.has_value()) check_axes(p, *options.axes, q);
  if (positions.has_value()) set_positions(p, *positions, options.axes, q, sequences);
  if (options.log_decay.has_value()) set_log_decay(p, *options.log_decay, q);
  require(options.attention_factor > 0, "attention_factor must be > 0, got ",
          options.attention_factor);
  const double sign = options.inverse ? -1.0 : 1.0;
  p.tensors[0].decay_sign = sign;
  p.tensors[1].decay_sign = -sign;
  p.amplitude = options.inverse ? 1.0 / options.attention_factor : options.attention_factor;
  p.conjugate = adjoint != options.inverse;
  p.interleaved = options.interleaved;
  p.offset = options.offset;
  p.decay_origin = options.decay_origin;
  return p;
}

}  // namespace extrope
