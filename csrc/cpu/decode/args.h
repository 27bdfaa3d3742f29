// Converts the arguments of `decode` and `append` to their params. All checks come before any
// write.
#pragma once

#include "common/attention_args.h"
#include "common/cache_args.h"
#include "cpu/decode/params.h"
#include "cpu/runtime/pair_maps.h"

namespace extrope::decode {

// Arguments of both ops; `op` begins every error.
struct CacheArgs {
  const char* op;
  TensorView k_cache, v_cache;
  OptionalView k, v;
  TensorView inv_freq, cache_seqlens;
  OptionalView block_table, cache_leftpad, log_decay, cu_seqlens_q;
  bool interleaved;
  int64_t rotary_offset;
  OptionalView k_scale, v_scale;

  bool packed() const { return cu_seqlens_q.has_value(); }
  template <typename... Message>
  void require(bool condition, const Message&... message) const {
    require_of(op, condition, message...);
  }
};

// Checks a tensor; packed: it has the tokens of packed sequences; scaled: it is in e4m3.
inline void check_tensor(const CacheArgs& a, const char* name, const TensorView& x,
                         const TensorView& like, bool packed = false, bool scaled = false) {
  const int64_t d = packed ? 3 : 4;
  a.require(x.dim() == d, name, " must have ", d, " dimensions", packed ? " with cu_seqlens_q" : "",
            ", got shape ", shape_of(x));
  check_cache_dtype(a.op, name, x, like, scaled);
  a.require(x.stride(d - 1) == 1 || x.size(d - 1) <= 1 || x.numel() == 0, name,
            " must be contiguous in its last dimension, got stride ", x.stride(d - 1));
}

inline bool same_sizes(const TensorView& x, const TensorView& y, int64_t dims) {
  for (int64_t i = 0; i < dims; ++i) {
    if (x.size(i) != y.size(i)) return false;
  }
  return true;
}

inline const int32_t* ints(const CacheArgs& a, const char* name, const TensorView& x, int64_t dim,
                           int64_t batch) {
  a.require(x.is_cpu() && x.scalar_type() == ScalarType::Int && x.dim() == dim &&
                x.size(0) == batch &&
                (x.numel() == 0 || x.size(dim - 1) == 1 || x.stride(dim - 1) == 1),
            name, " must be int32 (", batch, dim == 1 ? ",)" : ", max_blocks)",
            ", contiguous in its last dimension, on the CPU, got shape ", shape_of(x));
  return static_cast<const int32_t*>(x.data_ptr());
}

// Checks the values of cu_seqlens_q for `tokens` tokens: those past the last boundary are padding.
inline const int32_t* boundaries_of(const CacheArgs& a, int64_t tokens) {
  const TensorView& x = *a.cu_seqlens_q;
  a.require(x.scalar_type() == ScalarType::Int && x.dim() == 1 && x.size(0) >= 2 &&
                x.is_contiguous() && x.is_cpu(),
            "cu_seqlens_q must be contiguous int32 (sequences + 1,) on the CPU, got shape ",
            shape_of(x));
  const int32_t* cu = static_cast<const int32_t*>(x.data_ptr());
  const int64_t sequences = x.size(0) - 1;
  a.require(rise_from_zero(cu, sequences) && cu[sequences] <= tokens,
            "cu_seqlens_q must rise from 0 to q's ", tokens, " tokens at most");
  return cu;
}

inline void check_new_rows(const CacheArgs& a, const char* name, const TensorView& x,
                           const char* cache_name, const TensorView& cache,
                           const TensorView& like) {
  check_tensor(a, name, x, like, a.packed());
  const int64_t d = x.dim();
  a.require(x.size(d - 2) == cache.size(2) && x.size(d - 1) == cache.size(3), name, " must have ",
            cache_name, "'s heads and head_dim (", cache.size(2), ", ", cache.size(3),
            "), got shape ", shape_of(x));
  a.require(!overlaps_itself(cache), cache_name, " must not be expanded to be written to");
}

inline void check_new(const CacheArgs& a, const TensorView& like) {
  a.require(a.k.has_value() == a.v.has_value(), "k and v must be given together, got ",
            a.k.has_value() ? "k" : "v", " alone");
  if (!a.k.has_value()) return;
  check_new_rows(a, "k", *a.k, "k_cache", a.k_cache, like);
  check_new_rows(a, "v", *a.v, "v_cache", a.v_cache, like);
  const int64_t dims = like.dim() - 2;
  a.require(same_sizes(*a.v, *a.k, dims), "v must have k's tokens: k ", shape_of(*a.k), ", got ",
            shape_of(*a.v));
  a.require(same_sizes(*a.k, like, dims), "k must have q's ",
            a.packed() ? "total" : "batch and seqlen", ": q ", shape_of(like), ", got ",
            shape_of(*a.k));
}

// Checks the values of integer tensors: no slot outside the cache is read or written.
inline void check_slots(const CacheArgs& a, const KVCache& cache) {
  const int64_t pages = a.k_cache.size(0);
  for (int64_t b = 0; b < cache.batch; ++b) {
    a.require(cache.seqlens[b] >= 0 && cache.end(b) <= cache.capacity,
              "cache_seqlens must be between 0 and the cache's ", cache.capacity, " slots, ",
              cache.new_tokens(b), " new tokens included, got ", cache.seqlens[b]);
    a.require(cache.first_slot(b) >= 0, "cache_leftpad must be >= 0, got ", cache.first_slot(b));
    if (!cache.block_table) continue;
    const int32_t* page = cache.block_table + b * cache.table_batch;
    for (int64_t slot = 0; slot < cache.end(b); slot += cache.page_size, ++page) {
      a.require(0 <= *page && *page < pages, "block_table must name pages between 0 and ",
                pages - 1, ", got ", *page);
    }
  }
}

// Returns a call's cache, with all checks. like: q, or the new keys of an append.
inline KVCache cache_of(const CacheArgs& a, const TensorView& like) {
  const TensorView &k = a.k_cache, &v = a.v_cache;
  KVCache cache{};
  cache.dtype = dtype_of(a.op, like);
  check_tensor(a, "q", like, like, a.packed());
  const bool scaled = a.k_scale.has_value();
  check_tensor(a, "k_cache", k, like, /*packed=*/false, scaled);
  check_tensor(a, "v_cache", v, like, /*packed=*/false, scaled);
  set_cache_scales(a.op, a.k_scale, a.v_scale, k.size(2), k, cache);
  const int32_t* cu = a.packed() ? boundaries_of(a, like.size(0)) : nullptr;
  cache.batch = cu ? a.cu_seqlens_q->size(0) - 1 : like.size(0);
  cache.heads = k.size(2), cache.head_dim = like.size(like.dim() - 1), cache.head_dim_v = v.size(3);
  check_cache_scales(a.op, cache);
  const bool paged = a.block_table.has_value();
  a.require(k.size(3) == cache.head_dim && (paged || k.size(0) == cache.batch), "k_cache must be (",
            paged ? "num_blocks, block_size" : "batch, max_len", ", heads_k, ", cache.head_dim,
            "), got ", shape_of(k));
  a.require(same_sizes(v, k, 3), "v_cache must have k_cache's shape ", shape_of(k),
            " but for the last dimension, got ", shape_of(v));
  check_head_dim(a.op, "head_dim", cache.head_dim);
  check_head_dim(a.op, "v_cache's head_dim", cache.head_dim_v);
  check_new(a, like);
  if (a.k.has_value()) {
    cache.appended = cu ? 0 : a.k->size(1);
    cache.cu_new = cu;
  }
  cache.k = plane(k), cache.v = plane(v);
  cache.seqlens = ints(a, "cache_seqlens", a.cache_seqlens, 1, cache.batch);
  if (a.cache_leftpad) cache.leftpad = ints(a, "cache_leftpad", *a.cache_leftpad, 1, cache.batch);
  cache.page_size = cache.capacity = k.size(1);
  if (paged) {
    cache.block_table = ints(a, "block_table", *a.block_table, 2, cache.batch);
    cache.table_batch = a.block_table->stride(0);
    cache.capacity *= a.block_table->size(1);
    a.require(cache.page_size > 0, "k_cache must have a block_size >= 1, got 0");
  }
  check_slots(a, cache);
  return cache;
}

inline void set_queries(DecodeParams& p, const CacheArgs& a, const TensorView& q) {
  const Plane rows = plane(q);
  p.q = rows.data, p.q_stride_batch = rows.block, p.q_stride_seq = rows.slot,
  p.q_stride_head = rows.head;
  p.seqlen_q = q.size(a.packed() ? 0 : 1), p.heads_q = q.size(a.packed() ? 1 : 2);
  if (a.packed()) p.cu_seqlens_q = static_cast<const int32_t*>(a.cu_seqlens_q->data_ptr());
  a.require(p.cache.heads > 0 && p.heads_q % p.cache.heads == 0, "k_cache's heads must divide q's ",
            p.heads_q, " heads, got ", p.cache.heads);
}

inline void check_decay(const CacheArgs& a, const Regions& regions) {
  for (int64_t r = 0; r < regions.count; ++r) {
    a.require(!a.log_decay.has_value() || regions.at[r].k_map == regions.stored,
              "log_decay (XPOS) needs keys that are stored as every region sees them");
  }
}

inline const float* decay_of(const CacheArgs& a) {
  return a.log_decay.has_value() ? static_cast<const float*>(a.log_decay->data_ptr()) : nullptr;
}

// Holds the padded rows that `params` points to.
struct FrequencyRows {
  PaddedRows inv_freq, log_decay;
  Frequencies params;
};

inline FrequencyRows frequencies_of(const CacheArgs& a, const KVCache& cache) {
  check_frequencies(a.op, cache.head_dim, cache.batch, cache.heads, a.inv_freq, a.log_decay,
                    a.rotary_offset);
  FrequencyRows out{padded_rows(a.inv_freq), {}, {}};
  if (a.log_decay.has_value()) out.log_decay = padded_rows(*a.log_decay);
  out.params = {out.inv_freq.values.data(),
                a.log_decay.has_value() ? out.log_decay.values.data() : nullptr,
                out.inv_freq.half,
                out.inv_freq.padded,
                out.inv_freq.rows > 1 ? out.inv_freq.heads * out.inv_freq.padded : 0,
                a.interleaved,
                a.rotary_offset,
                out.inv_freq.heads};
  return out;
}

}  // namespace extrope::decode
