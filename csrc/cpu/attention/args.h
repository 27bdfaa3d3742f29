// From torch tensors to AttentionParams, with every check, before any kernel starts.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "common/rope_args.h"
#include "cpu/attention/params.h"

namespace extrope::attention {

constexpr int64_t kMaxHeadDim = 256, kMaxSeqlen = INT32_MAX - 1024;

template <typename... Message>
void require(bool condition, const Message&... message) {
  require_of("region_attn", condition, message...);
}

struct Options {
  OptionalTensor row_scale, cu_seqlens;
  std::vector<int64_t> starts;
  int64_t granularity;
  double softmax_scale;
  std::vector<Tensor> q_turns, k_turns;  // one a region, empty: not turned; or none at all
  bool interleaved;
};

// A tensor (batch, seqlen, heads, head_dim) or (total, heads, head_dim); `name` goes into errors.
inline AttentionTensor view(const Tensor& x, bool packed, const char* name) {
  check_rows("region_attn", x, packed, name);
  const int64_t d = x.dim();
  return {x.data_ptr(), packed ? 0 : x.stride(0), x.stride(d - 3), x.stride(d - 2)};
}

inline void check_like(const Tensor& x, const Tensor& like, const char* name, const char* of) {
  require(x.scalar_type() == like.scalar_type(), name, " must have ", of, "'s dtype");
  bool same = x.dim() == like.dim() && x.get_device() == like.get_device();
  for (int64_t i = 0; same && i < x.dim(); ++i) same = x.size(i) == like.size(i);
  require(same, name, " must be like ", of, " ", shape_of(like), ", got ", shape_of(x));
}

inline void set_sizes(AttentionParams& p, const Tensor& q, const Tensor& k, bool packed) {
  const int64_t d = q.dim();
  p.batch = packed ? 1 : q.size(0);
  p.seqlen_q = q.size(d - 3), p.seqlen_k = k.size(d - 3);
  p.heads_q = q.size(d - 2), p.heads_k = k.size(d - 2);
  p.head_dim = q.size(d - 1);
  require(k.scalar_type() == q.scalar_type(), "k must have q's dtype");
  require(k.size(d - 1) == p.head_dim && (packed ? p.seqlen_k == p.seqlen_q : k.size(0) == p.batch),
          "k must have q's batch and head_dim, and with cu_seqlens its tokens: q ", shape_of(q),
          ", got ", shape_of(k));
  require(p.head_dim % 8 == 0 && p.head_dim >= 8 && p.head_dim <= kMaxHeadDim,
          "head_dim must be a multiple of 8 from 8 to ", kMaxHeadDim, ", got ", p.head_dim);
  require(p.heads_k > 0 && p.heads_q % p.heads_k == 0,
          "heads of q must be a multiple of those of k ", p.heads_k, ", got ", p.heads_q);
  require(p.seqlen_q <= kMaxSeqlen && p.seqlen_k <= kMaxSeqlen, "sequences must be shorter than ",
          kMaxSeqlen, ", got ", p.seqlen_q, " and ", p.seqlen_k);
}

inline void set_regions(AttentionParams& p, const Options& options) {
  p.regions = static_cast<int64_t>(options.starts.size());
  p.granularity = options.granularity;
  p.softmax_scale = static_cast<float>(options.softmax_scale);
  require(p.regions >= 1 && p.regions <= kMaxRegions, "starts must have 1 to ", kMaxRegions,
          " regions, got ", p.regions);
  require(p.granularity >= 1, "granularity must be at least 1, got ", p.granularity);
  for (int64_t r = 0; r < p.regions; ++r) {
    p.starts[r] = options.starts[r];
    require(r == 0 || p.starts[r] >= p.starts[r - 1], "starts must rise, got ", p.starts[r],
            " after ", p.starts[r == 0 ? 0 : r - 1]);
  }
}

inline void set_row_scale(AttentionParams& p, const Tensor& row_scale) {
  require(row_scale.scalar_type() == ScalarType::Float && row_scale.dim() == 1 &&
              row_scale.size(0) == p.seqlen_q && row_scale.is_contiguous() && row_scale.is_cpu(),
          "row_scale must be contiguous float32 (", p.seqlen_q, ",), got shape ",
          shape_of(row_scale));
  p.row_scale = static_cast<const float*>(row_scale.data_ptr());
}

inline void set_cu_seqlens(AttentionParams& p, const Tensor& cu_seqlens) {
  require(cu_seqlens.scalar_type() == ScalarType::Int && cu_seqlens.dim() == 1 &&
              cu_seqlens.size(0) >= 1 && cu_seqlens.is_contiguous() && cu_seqlens.is_cpu(),
          "cu_seqlens must be contiguous int32 (sequences + 1,), got shape ", shape_of(cu_seqlens));
  p.cu_seqlens = static_cast<const int32_t*>(cu_seqlens.data_ptr());
  p.num_sequences = cu_seqlens.size(0) - 1;
  const int32_t* cu = p.cu_seqlens;
  bool ordered = cu[0] == 0 && cu[p.num_sequences] == p.seqlen_q;
  for (int64_t i = 0; ordered && i < p.num_sequences; ++i) ordered = cu[i] <= cu[i + 1];
  require(ordered, "cu_seqlens must rise from 0 to the number of tokens ", p.seqlen_q);
}

// A table (batch or 1, tokens or 1, 2 * half), or an empty tensor.
inline AttentionTurn turn_of(AttentionParams& p, const Tensor& table, int64_t tokens,
                             const char* name) {
  if (table.numel() == 0) return {};
  require(table.scalar_type() == ScalarType::Float && table.dim() == 3 && table.is_contiguous() &&
              table.is_cpu() && (table.size(0) == p.batch || table.size(0) == 1) &&
              (table.size(1) == tokens || table.size(1) == 1) && table.size(2) % 2 == 0 &&
              table.size(2) <= p.head_dim && (p.half == 0 || p.half == table.size(2) / 2),
          "every table of ", name, " must be contiguous float32 (", p.batch, " or 1, ", tokens,
          " or 1, rotary_dim), got shape ", shape_of(table));
  p.half = table.size(2) / 2;
  return {static_cast<const float*>(table.data_ptr()), table.size(0) > 1 ? table.stride(0) : 0,
          table.size(1) > 1 ? table.stride(1) : 0};
}

inline void set_turns(AttentionParams& p, const Options& options) {
  p.interleaved = options.interleaved;
  const auto& q = options.q_turns;
  const auto& k = options.k_turns;
  if (q.empty() && k.empty()) return;
  const size_t regions = options.starts.size();
  require(q.size() == regions && k.size() == regions,
          "q_turns and k_turns must be empty or have one tensor a region (", p.regions, "), got ",
          q.size(), " and ", k.size());
  for (int64_t r = 0; r < p.regions; ++r) {
    p.q_turn[r] = turn_of(p, q[r], p.seqlen_q, "q_turns");
    p.k_turn[r] = turn_of(p, k[r], p.seqlen_k, "k_turns");
    require(p.dtype == DType::f32 || !p.k_turn[r].table, "k turns in the kernel in float32 only");
    require(p.q_turn[r].table || p.seqlen_q == 0, "every region must turn q, or none");
  }
}

inline AttentionParams make_params(const std::vector<Tensor>& q, const std::vector<Tensor>& k,
                                   const Tensor& v, const Options& options) {
  AttentionParams p{};
  const bool packed = options.cu_seqlens.has_value();
  set_regions(p, options);
  require(q.size() == options.starts.size() && k.size() == options.starts.size(),
          "q and k must have one tensor a region (", p.regions, "), got ", q.size(), " and ",
          k.size());
  p.dtype = dtype_of("region_attn", q[0]);
  for (int64_t r = 0; r < p.regions; ++r) {
    p.q[r] = view(q[r], packed, "q");
    p.k[r] = view(k[r], packed, "k");
    check_like(q[r], q[0], "every q", "the first");
    check_like(k[r], k[0], "every k", "the first");
  }
  set_sizes(p, q[0], k[0], packed);
  p.v = view(v, packed, "v");
  check_like(v, k[0], "v", "k");
  set_turns(p, options);
  if (options.row_scale.has_value()) set_row_scale(p, *options.row_scale);
  if (packed) set_cu_seqlens(p, *options.cu_seqlens);
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
