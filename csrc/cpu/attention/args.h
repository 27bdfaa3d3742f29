// Converts an op's arguments to AttentionParams, with all checks, before any kernel starts.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <vector>

#include "common/attention_args.h"
#include "cpu/attention/params.h"
#include "cpu/attention/rotated_keys.h"
#include "cpu/runtime/pair_maps.h"

namespace extrope::attention {

constexpr int64_t kMaxSeqlen = INT32_MAX - 1024;
constexpr int64_t kMaxStart = 1 << 29;

template <typename... Message>
void require(bool condition, const Message&... message) {
  require_of("attention", condition, message...);
}

#define EXTROPE_STARTS(X)           \
  X(const OptionalTensor&, q_start) \
  X(const OptionalTensor&, k_start)

// The arguments of an op after q, k and v.
struct Args : CallTensors {
  EXTROPE_STARTS(EXTROPE_MEMBER)
  AttentionOptions options;

  bool packed() const { return cu_seqlens.has_value(); }
  std::vector<double> pair_maps_of(AttentionParams& p) const {
    const int64_t half = inv_freq.size(inv_freq.dim() - 1);
    return set_pair_maps("attention", pair_maps, half, log_decay.has_value(), p.regions);
  }
  RotationArgs rotation() const {
    const double factor = options.attention_factor;
    return {padded_rows(inv_freq),
            log_decay.has_value() ? padded_rows(*log_decay).values : std::vector<double>(),
            factor * factor};
  }
};

// Views a tensor (batch, seqlen, heads, head_dim) or (total, heads, head_dim); errors have `name`.
inline AttentionTensor view(const Tensor& x, bool packed, const char* name) {
  check_rows("attention", x, packed, name);
  const int64_t d = x.dim();
  return {x.data_ptr(), packed ? 0 : x.stride(0), x.stride(d - 3), x.stride(d - 2), x.size(d - 1)};
}

// Checks that x is like `like`, except for the last dimension, which is v's head_dim.
inline void check_like(const Tensor& x, const Tensor& like, int64_t head_dim_v, const char* name,
                       const char* of) {
  require(x.scalar_type() == like.scalar_type(), name, " must have ", of, "'s dtype");
  const int64_t last = like.dim() - 1;
  bool same = x.dim() == like.dim() && x.is_cpu() && x.size(last) == head_dim_v;
  for (int64_t i = 0; same && i < last; ++i) same = x.size(i) == like.size(i);
  require(same, name, " must have ", of, "'s shape ", shape_of(like),
          " but for the last dimension, got ", shape_of(x));
}

inline void set_sizes(AttentionParams& p, const Tensor& q, const Tensor& k, bool packed) {
  const int64_t d = q.dim();
  p.batch = packed ? 1 : q.size(0);
  p.seqlen_q = p.lse_head = q.size(d - 3), p.seqlen_k = k.size(d - 3);
  p.heads_q = q.size(d - 2), p.heads_k = k.size(d - 2);
  p.head_dim = q.size(d - 1);
  require(k.scalar_type() == q.scalar_type(), "k must have q's dtype");
  require(k.size(d - 1) == p.head_dim && (packed ? p.seqlen_k == p.seqlen_q : k.size(0) == p.batch),
          "k must have q's batch and head_dim, and with cu_seqlens its tokens: q ", shape_of(q),
          ", got ", shape_of(k));
  check_head_dim("attention", "head_dim", p.head_dim);
  require(p.heads_k > 0 && p.heads_q % p.heads_k == 0, "k's heads must divide q's ", p.heads_q,
          " heads, got ", p.heads_k);
  require(p.seqlen_q <= kMaxSeqlen && p.seqlen_k <= kMaxSeqlen, "sequences must be shorter than ",
          kMaxSeqlen, ", got ", p.seqlen_q, " and ", p.seqlen_k);
}

inline Starts starts_of(const char* name, const OptionalTensor& start, int64_t sequences) {
  if (!start.has_value()) return {};
  require(start->scalar_type() == ScalarType::Int && start->is_cpu() && start->dim() == 1 &&
              (start->size(0) == 1 || start->size(0) == sequences),
          name, " must be an int, or int32 (", sequences, ",), got shape ", shape_of(*start));
  const Starts starts{static_cast<const int32_t*>(start->data_ptr()),
                      start->size(0) > 1 ? start->stride(0) : 0, 0};
  for (int64_t i = 0; i < sequences; ++i) {
    require(0 <= starts.of(i) && starts.of(i) < kMaxStart, name,
            " must be between 0 and 2**29, got ", starts.of(i));
  }
  return starts;
}

// Without q_start, queries and keys end together.
inline void set_starts(AttentionParams& p, const Args& args) {
  const int64_t sequences = p.cu_seqlens ? p.num_sequences : p.batch;
  p.k_start = starts_of("k_start", args.k_start, sequences);
  p.q_start = starts_of("q_start", args.q_start, sequences);
  if (args.q_start.has_value()) return;
  p.q_start = p.k_start;
  p.q_start.offset = p.cu_seqlens ? 0 : p.seqlen_k - p.seqlen_q;
}

// Returns the first position after all queries.
inline int64_t end_of_queries(const AttentionParams& p) {
  if (!p.cu_seqlens && p.q_start.stride == 0) return p.q_start.of(0) + p.seqlen_q;
  int64_t end = 0;
  for (int64_t s = 0; s < (p.cu_seqlens ? p.num_sequences : p.batch); ++s) {
    const int64_t seqlen = p.cu_seqlens ? p.cu_seqlens[s + 1] - p.cu_seqlens[s] : p.seqlen_q;
    end = std::max(end, p.q_start.of(s) + seqlen);
  }
  return end;
}

inline AttentionParams make_params(const Tensor& q, const Tensor& k, const Tensor& v,
                                   const Args& args) {
  AttentionParams p{};
  const bool packed = args.packed();
  p.dtype = dtype_of("attention", q);
  p.q = view(q, packed, "q");
  const AttentionTensor raw_k = view(k, packed, "k");
  for (AttentionTensor& x : p.k) x = raw_k;
  require(q.is_cpu() && k.is_cpu(), "q and k must be on the CPU");
  set_sizes(p, q, k, packed);
  p.v = view(v, packed, "v");
  check_like(v, k, p.v.head_dim, "v", "k");
  check_head_dim("attention", "v's head_dim", p.v.head_dim);
  if (packed) {
    set_cu_seqlens("attention", p, *args.cu_seqlens, q);
    check_boundaries("attention", p, p.seqlen_q);
  }
  set_starts(p, args);
  check_frequencies("attention", p.head_dim, packed ? p.num_sequences : p.batch, p.heads_k,
                    args.inv_freq, args.log_decay, args.options.first_dim());
  const AttentionOptions& options = args.options;
  static_cast<SoftmaxParams&>(p) =
      softmax_of("attention", args, options, p.batch, p.seqlen_q, p.heads_q, p.head_dim);
  p.regions = options.regions;
  p.regions.trim(end_of_queries(p));
  p.rotation = {p.head_dim, args.inv_freq.size(args.inv_freq.dim() - 1), options.first_dim(),
                options.interleaved};
  return p;
}

inline float* check_lse(const AttentionParams& p, const Tensor& lse, const char* name) {
  const bool packed = p.cu_seqlens != nullptr;
  const int64_t d = lse.dim();
  require(lse.scalar_type() == ScalarType::Float && lse.is_contiguous() && lse.is_cpu() &&
              d == (packed ? 2 : 3) && lse.size(d - 1) == p.seqlen_q &&
              lse.size(d - 2) == p.heads_q && (packed || lse.size(0) == p.batch),
          name,
          " must be contiguous float32 (batch, heads_q, seqlen_q), or (heads_q, total) with "
          "cu_seqlens, got shape ",
          shape_of(lse));
  return static_cast<float*>(lse.data_ptr());
}

}  // namespace extrope::attention
