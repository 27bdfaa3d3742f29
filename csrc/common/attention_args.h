// The keyword arguments of the ops of attention, with and without a cache, and their checks.
#pragma once

#include <cmath>
#include <optional>
#include <vector>

#include "common/map_args.h"
#include "common/ops.h"
#include "common/softmax_params.h"

namespace extrope {

// The arguments that all ops have, as `AttentionCall` of extrope_kernels/ops/attention/call.py has
// them: tensors, numbers of the model, and a score.
#define EXTROPE_CALL_TENSORS(X)         \
  X(const Tensor&, inv_freq)            \
  X(const OptionalTensor&, cu_seqlens)  \
  X(const OptionalTensor&, log_decay)   \
  X(const OptionalTensor&, sinks)       \
  X(const OptionalTensor&, query_scale) \
  X(const OptionalTensor&, pair_maps)
#define EXTROPE_CALL_NUMBERS(X)             \
  X(std::optional<double>, softmax_scale)   \
  X(double, attention_factor)               \
  X(bool, interleaved)                      \
  X(std::optional<int64_t>, rotary_offset)  \
  X(double, softcap)                        \
  X(std::optional<int64_t>, sliding_window) \
  X(bool, float32_results)
#define EXTROPE_SCORE(X)                        \
  X(int64_t, granularity)                       \
  X(const std::vector<int64_t>&, region_starts) \
  X(const std::vector<int64_t>&, map_kinds)     \
  X(const Column<int64_t>&, map_moduli)         \
  X(const Column<double>&, map_divisors)        \
  X(const Column<bool>&, map_floors)            \
  X(const Column<double>&, map_offsets)         \
  X(const Column<double>&, map_caps)            \
  X(const Column<int64_t>&, map_rows)
// The parameters for numbers and score, and the call that reads them.
#define EXTROPE_OPTIONS EXTROPE_CALL_NUMBERS(EXTROPE_PARAMETER) EXTROPE_SCORE(EXTROPE_PARAMETER)
#define EXTROPE_READ_OPTIONS(op)                                                                   \
  AttentionOptions {                                                                               \
    EXTROPE_CALL_NUMBERS(EXTROPE_VALUE)                                                            \
    regions_of(op, granularity, sliding_window, region_starts,                                     \
               {map_kinds, map_moduli, map_divisors, map_floors, map_offsets, map_caps, map_rows}) \
  }

struct CallTensors {
  EXTROPE_CALL_TENSORS(EXTROPE_MEMBER)
};

struct AttentionOptions {
  EXTROPE_CALL_NUMBERS(EXTROPE_MEMBER)
  Regions regions;

  int64_t first_dim() const { return rotary_offset.value_or(0); }
};

// Reads regions, far keys first. The maps are the q_map and the k_map of each region in turn, and
// then those by which queries and keys come rotated.
inline Regions regions_of(const char* op, int64_t granularity,
                          std::optional<int64_t> sliding_window, const std::vector<int64_t>& starts,
                          const MapColumns& maps) {
  const size_t count = starts.size();
  require_of(op, 1 <= count && count <= kMaxRegions, "region_starts must be of 1 to ", kMaxRegions,
             " regions, got ", count);
  check_columns(op, maps, 2 * count + 2);
  require_of(op, std::is_sorted(starts.begin(), starts.end()),
             "a score must have regions with rising starts");
  // Sums of a position and a start must not overflow.
  require_of(op, -kNoWindow <= starts.front() && starts.back() <= kNoWindow,
             "region_starts must be within 2**62, got ", starts.front(), " to ", starts.back());
  require_of(op, granularity >= 1, "a score's granularity must be >= 1, got ", granularity);
  const int64_t window = sliding_window.value_or(1);
  require_of(op, window >= 1, "sliding_window must be >= 1, got ", window);
  require_of(op, window < kNoWindow, "sliding_window must be < 2**62, got ", window);
  Regions regions{static_cast<int64_t>(count), granularity};
  for (size_t r = 0; r < count; ++r) {
    regions.at[r] = {starts[r], map_at(op, maps, 2 * r), map_at(op, maps, 2 * r + 1)};
  }
  regions.q_stored = map_at(op, maps, 2 * count);
  regions.stored = map_at(op, maps, 2 * count + 1);
  require_of(op,
             regions.q_stored == PositionMap::constant(0) ||
                 (regions.q_stored == PositionMap{} && regions.stored == PositionMap{}),
             "q must come raw, or at its own positions as k does");
  regions.sliding_window = sliding_window.value_or(kNoWindow);
  return regions;
}

inline void check_head_dim(const char* op, const char* name, int64_t head_dim) {
  require_of(op, head_dim % 8 == 0 && 8 <= head_dim && head_dim <= kMaxHeadDim, name,
             " must be a multiple of 8 up to ", kMaxHeadDim,
             " (backend='reference' takes any), got ", head_dim);
}

inline void check_frequencies(const char* op, int64_t head_dim, int64_t sequences, int64_t heads_k,
                              const Tensor& inv_freq, const OptionalTensor& log_decay,
                              int64_t rotary_offset) {
  const int64_t dim = inv_freq.dim(), half = dim >= 1 ? inv_freq.size(dim - 1) : 0;
  const ScalarType type = inv_freq.scalar_type();
  const auto fits = [&](int64_t i, int64_t size) {
    return inv_freq.size(i) == 1 || inv_freq.size(i) == size;
  };
  require_of(op,
             (type == ScalarType::Float || type == ScalarType::Double) && inv_freq.is_cpu() &&
                 dim <= 3 && (dim == 1 || fits(0, sequences)) && (dim < 3 || fits(1, heads_k)) &&
                 half >= 1 && 2 * half <= head_dim && (half == 1 || inv_freq.stride(dim - 1) == 1),
             "inv_freq must be float32 or float64 (rotary_dim/2,), (", sequences,
             ", rotary_dim/2) or (", sequences, ", ", heads_k,
             ", rotary_dim/2), up to head_dim/2 = ", head_dim / 2,
             " contiguous frequencies, got shape ", shape_of(inv_freq));
  const int64_t most = head_dim - 2 * half;
  require_of(op, 0 <= rotary_offset && rotary_offset <= most && rotary_offset % 2 == 0,
             "rotary_offset must be even, from 0 to head_dim - rotary_dim = ", most,
             " (backend='reference' takes odd ones too), got ", rotary_offset);
  if (!log_decay.has_value()) return;
  require_of(op,
             log_decay->scalar_type() == ScalarType::Float && log_decay->dim() == 1 &&
                 log_decay->size(0) == half && log_decay->is_contiguous() && log_decay->is_cpu(),
             "log_decay must be contiguous float32 (", half, ",), got shape ",
             shape_of(*log_decay));
}

// Checks a number as `Range` of extrope_kernels/ops/_tables/fields.py does, with its limits.
inline void check_range(const char* op, const char* name, double value, double least, double most,
                        bool or_zero = false) {
  const bool fits = (least > 0 ? value >= least : value > 0) && value <= most;
  require_of(op, fits || (or_zero && value == 0), name, " must be ", or_zero ? "0 (none) or " : "",
             least > 0 ? "from " : "> ", least, least > 0 ? " to " : " and at most ", most,
             ", got ", value);
}

inline void check_numbers(const char* op, const AttentionOptions& x) {
  check_range(op, "softmax_scale", x.softmax_scale.value_or(1), 0, 1e30);
  check_range(op, "attention_factor", x.attention_factor, 0, 1e15);
  check_range(op, "softcap", x.softcap, 1e-30, 1e30, /*or_zero=*/true);
}

inline Sinks sinks_of(const char* op, const OptionalTensor& sinks, int64_t heads_q) {
  if (!sinks.has_value()) return {};
  require_of(op,
             sinks->scalar_type() == ScalarType::Float && sinks->dim() == 1 &&
                 sinks->size(0) == heads_q && sinks->is_cpu(),
             "sinks must be float32 (", heads_q, ",), got shape ", shape_of(*sinks));
  return {static_cast<const float*>(sinks->data_ptr()), sinks->stride(0)};
}

// Checks and reads (seqlen_q,) or (batch, seqlen_q), for packed queries (total,).
inline QueryScale query_scale_of(const char* op, const OptionalTensor& scale, int64_t batch,
                                 int64_t seqlen_q, bool packed) {
  if (!scale.has_value()) return {};
  const int64_t dim = scale->dim();
  require_of(op,
             scale->scalar_type() == ScalarType::Float && scale->is_cpu() &&
                 (dim == 1 || (dim == 2 && !packed && scale->size(0) == batch)) &&
                 scale->size(dim - 1) == seqlen_q,
             "query_scale must be float32 (", seqlen_q, ",) or (", batch, ", ", seqlen_q,
             "), got shape ", shape_of(*scale));
  return {static_cast<const float*>(scale->data_ptr()), dim == 2 ? scale->stride(0) : 0,
          scale->stride(dim - 1)};
}

inline SoftmaxParams softmax_of(const char* op, const CallTensors& call,
                                const AttentionOptions& options, int64_t batch, int64_t seqlen_q,
                                int64_t heads_q, int64_t head_dim) {
  check_numbers(op, options);
  const double usual = 1.0 / std::sqrt(static_cast<double>(head_dim));
  const bool packed = call.cu_seqlens.has_value();
  return {.softmax_scale = options.softmax_scale.value_or(usual),
          .softcap = static_cast<float>(options.softcap),
          .query_scale = query_scale_of(op, call.query_scale, batch, seqlen_q, packed),
          .sinks = sinks_of(op, call.sinks, heads_q)};
}

}  // namespace extrope
