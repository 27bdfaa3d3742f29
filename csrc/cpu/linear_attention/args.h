// From torch tensors to ScanParams, with what could make a kernel read or write out of bounds
// checked; the rest is checked in Python (extrope_kernels/ops/linear_attention/checks.py).
#pragma once

#include <vector>

#include "common/tensor_args.h"
#include "cpu/linear_attention/params.h"

namespace extrope::linear_attention {

template <typename... Message>
void require(bool condition, const Message&... message) {
  require_of("linear_attn", condition, message...);
}

inline ScanTensor view(const Tensor& x, bool packed, const char* name) {
  check_rows("linear_attn", x, packed, name);
  require(x.is_cpu(), name, " must be on the CPU");
  const int64_t d = x.dim();
  return {x.data_ptr(), packed ? 0 : x.stride(0), x.stride(d - 3), x.stride(d - 2), x.size(d - 2)};
}

// Whether all dimensions but the last are the same.
inline bool same_rows(const Tensor& x, const Tensor& like) {
  bool same = x.dim() == like.dim();
  for (int64_t i = 0; same && i + 1 < x.dim(); ++i) same = x.size(i) == like.size(i);
  return same;
}

inline void check_like(const Tensor& x, const Tensor& like, const char* name) {
  const int64_t last = like.dim() - 1;
  require(x.scalar_type() == like.scalar_type() && same_rows(x, like) &&
              x.size(last) == like.size(last),
          name, " must have the other's shape and dtype");
}

inline void set_sizes(ScanParams& p, const Tensor& q, bool packed) {
  const int64_t d = q.dim();
  p.batch = packed ? 1 : q.size(0);
  p.seqlen = q.size(d - 3);
  p.score_dim = q.size(d - 1);
}

inline void set_cu_seqlens(ScanParams& p, const Tensor& cu_seqlens) {
  require(cu_seqlens.scalar_type() == ScalarType::Int && cu_seqlens.dim() == 1 &&
              cu_seqlens.size(0) >= 1 && cu_seqlens.is_contiguous() && cu_seqlens.is_cpu(),
          "cu_seqlens must be contiguous int32 (sequences + 1,)");
  p.cu_seqlens = static_cast<const int32_t*>(cu_seqlens.data_ptr());
  p.num_sequences = cu_seqlens.size(0) - 1;
  require(
      rise_from_zero(p.cu_seqlens, p.num_sequences) && p.cu_seqlens[p.num_sequences] == p.seqlen,
      "cu_seqlens must rise from 0 to the number of tokens ", p.seqlen);
}

inline ScanParams make_params(const Tensor& q, const Tensor& k, const Tensor& v, int64_t heads,
                              const OptionalTensor& cu_seqlens) {
  ScanParams p{};
  const bool packed = cu_seqlens.has_value();
  p.dtype = dtype_of("linear_attn", q);
  p.q = view(q, packed, "q"), p.k = view(k, packed, "k"), p.v = view(v, packed, "v");
  set_sizes(p, q, packed);
  p.value_dim = v.size(v.dim() - 1);
  p.heads = heads;
  for (const Tensor* other : {&k, &v}) {
    require(other->scalar_type() == q.scalar_type() && other->size(0) == q.size(0) &&
                (packed || other->size(1) == p.seqlen),
            "q, k and v must have the same dtype, batch and tokens");
  }
  require(k.size(k.dim() - 1) == p.score_dim, "q and k must have the same dim");
  require(p.v.heads == p.k.heads, "v must have the heads of k");
  for (const int64_t given : {p.q.heads, p.k.heads}) {
    require(given > 0 && heads > 0 && (given % heads == 0 || heads % given == 0),
            "heads of a tensor and of states must divide one another, got ", given, " and ", heads);
  }
  require(p.q.heads <= heads || p.k.heads <= heads, "q and k cannot both have groups of heads");
  if (packed) set_cu_seqlens(p, *cu_seqlens);
  return p;
}

inline float* floats(const Tensor& x, const std::vector<int64_t>& shape, const char* name) {
  bool fits = x.dim() == static_cast<int64_t>(shape.size());
  for (int64_t i = 0; fits && i < x.dim(); ++i) fits = x.size(i) == shape[i];
  require(fits && x.scalar_type() == ScalarType::Float && x.is_contiguous() && x.is_cpu(), name,
          " must be contiguous float32 of the right shape");
  return static_cast<float*>(x.data_ptr());
}

inline RowNumbers numbers(const ScanParams& p, const OptionalTensor& x, int64_t heads,
                          const char* name) {
  if (!x.has_value()) return {nullptr, 1};
  std::vector<int64_t> shape{p.batch, heads, p.seqlen};
  if (p.cu_seqlens) shape.erase(shape.begin());
  return {floats(*x, shape, name), heads};
}

}  // namespace extrope::linear_attention
