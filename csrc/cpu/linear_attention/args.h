// From torch tensors to SweepParams, with what could make a kernel read or write out of bounds
// checked; the rest is checked in Python (extrope_kernels/ops/permuteformer/arguments.py).
#pragma once

#include <vector>

#include "common/tensor_args.h"
#include "cpu/linear_attention/params.h"

namespace extrope::sweep {

template <typename... Message>
void require(bool condition, const Message&... message) {
  require_of("linear_attn", condition, message...);
}

inline SweepTensor view(const Tensor& x, bool packed, const char* name) {
  check_rows("linear_attn", x, packed, name);
  require(x.is_cpu(), name, " must be on the CPU");
  const int64_t d = x.dim();
  return {x.data_ptr(), packed ? 0 : x.stride(0), x.stride(d - 3), x.stride(d - 2), x.size(d - 2)};
}

inline void check_like(const Tensor& x, const Tensor& like, const char* name) {
  bool same = x.dim() == like.dim() && x.scalar_type() == like.scalar_type();
  for (int64_t i = 0; same && i < x.dim(); ++i) same = x.size(i) == like.size(i);
  require(same, name, " must have the other's shape and dtype");
}

inline void set_sizes(SweepParams& p, const Tensor& x, bool packed) {
  const int64_t d = x.dim();
  p.batch = packed ? 1 : x.size(0);
  p.seqlen = x.size(d - 3);
  p.score_dim = x.size(d - 1);
}

inline void set_cu_seqlens(SweepParams& p, const Tensor& cu_seqlens) {
  require(cu_seqlens.scalar_type() == ScalarType::Int && cu_seqlens.dim() == 1 &&
              cu_seqlens.size(0) >= 1 && cu_seqlens.is_contiguous() && cu_seqlens.is_cpu(),
          "cu_seqlens must be contiguous int32 (sequences + 1,)");
  p.cu_seqlens = static_cast<const int32_t*>(cu_seqlens.data_ptr());
  p.num_sequences = cu_seqlens.size(0) - 1;
  bool ordered = p.cu_seqlens[0] == 0 && p.cu_seqlens[p.num_sequences] == p.seqlen;
  for (int64_t i = 0; ordered && i < p.num_sequences; ++i) {
    ordered = p.cu_seqlens[i] <= p.cu_seqlens[i + 1];
  }
  require(ordered, "cu_seqlens must rise from 0 to the number of tokens ", p.seqlen);
}

inline SweepParams make_params(const Tensor& x, const Tensor& y, const Tensor& w, int64_t heads,
                               const OptionalTensor& cu_seqlens) {
  SweepParams p{};
  const bool packed = cu_seqlens.has_value();
  p.dtype = dtype_of("linear_attn", x);
  p.x = view(x, packed, "x"), p.y = view(y, packed, "y"), p.w = view(w, packed, "w");
  set_sizes(p, x, packed);
  p.value_dim = w.size(w.dim() - 1);
  p.heads = heads;
  for (const Tensor* other : {&y, &w}) {
    require(other->scalar_type() == x.scalar_type() && other->size(0) == x.size(0) &&
                (packed || other->size(1) == p.seqlen),
            "x, y and w must have the same dtype, batch and tokens");
  }
  require(y.size(y.dim() - 1) == p.score_dim, "x and y must have the same dim");
  require(p.w.heads == p.y.heads, "w must have the heads of y");
  for (const int64_t given : {p.x.heads, p.y.heads}) {
    require(given > 0 && heads > 0 && (given % heads == 0 || heads % given == 0),
            "heads of a tensor and of states must divide one another, got ", given, " and ", heads);
  }
  require(p.x.heads <= heads || p.y.heads <= heads, "x and y cannot both have groups of heads");
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

inline RowNumbers numbers(const SweepParams& p, const OptionalTensor& x, int64_t heads,
                          const char* name) {
  if (!x.has_value()) return {nullptr, 1};
  std::vector<int64_t> shape{p.batch, heads, p.seqlen};
  if (p.cu_seqlens) shape.erase(shape.begin());
  return {floats(*x, shape, name), heads};
}

}  // namespace extrope::sweep
