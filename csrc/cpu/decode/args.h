// From the arguments of `decode` and `append` to their params, with every check, before anything
// is written.
#pragma once

#include "common/attention_args.h"
#include "cpu/decode/params.h"
#include "cpu/runtime/frequencies.h"

namespace extrope::decode {

constexpr int64_t kMaxHeadDim = 256;

// What both ops take; `op` goes in front of every error.
struct CacheArgs {
  const char* op;
  const Tensor &k_cache, &v_cache;
  const OptionalTensor &k, &v;
  const Tensor &inv_freq, &cache_seqlens;
  const OptionalTensor &block_table, &cache_leftpad, &log_decay;
  bool interleaved;

  template <typename... Message>
  void require(bool condition, const Message&... message) const {
    require_of(op, condition, message...);
  }
};

inline Plane plane(const Tensor& x) {
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

inline void check_tensor(const CacheArgs& a, const char* name, const Tensor& x,
                         const Tensor& like) {
  a.require(x.dim() == 4, name, " must have 4 dimensions, got shape ", shape_of(x));
  a.require(x.is_cpu() && x.scalar_type() == like.scalar_type(), name,
            " must be of the other tensors' dtype, on the CPU");
  a.require(x.stride(3) == 1 || x.size(3) <= 1 || x.numel() == 0, name,
            " must be contiguous in its last dimension, got stride ", x.stride(3));
}

inline const int32_t* ints(const CacheArgs& a, const char* name, const Tensor& x, int64_t dim,
                           int64_t batch) {
  a.require(x.is_cpu() && x.scalar_type() == ScalarType::Int && x.dim() == dim &&
                x.size(0) == batch && (x.numel() == 0 || x.stride(dim - 1) == 1),
            name, " must be int32 (", batch, dim == 1 ? ",)" : ", max_blocks)",
            ", contiguous in its last dimension, on the CPU, got shape ", shape_of(x));
  return static_cast<const int32_t*>(x.data_ptr());
}

inline void check_new(const CacheArgs& a, const Tensor& like) {
  a.require(a.k.has_value() == a.v.has_value(), "k and v must be given together, got ",
            a.k.has_value() ? "k" : "v", " alone");
  if (!a.k.has_value()) return;
  check_tensor(a, "k", *a.k, like);
  check_tensor(a, "v", *a.v, like);
  a.require(a.k->size(0) == like.size(0) && a.k->size(1) == like.size(1),
            "k must have q's batch and seqlen (", like.size(0), ", ", like.size(1), "), got shape ",
            shape_of(*a.k));
  a.require(a.k->size(2) == a.k_cache.size(2) && a.k->size(3) == a.k_cache.size(3),
            "k must have k_cache's heads and head_dim (", a.k_cache.size(2), ", ",
            a.k_cache.size(3), "), got shape ", shape_of(*a.k));
  for (int64_t i = 0; i < 4; ++i) {
    a.require(a.v->size(i) == a.k->size(i), "v must have k's shape ", shape_of(*a.k), ", got ",
              shape_of(*a.v));
  }
  for (const Tensor* x : {&a.k_cache, &a.v_cache}) {
    a.require(!overlaps_itself(*x), x == &a.k_cache ? "k_cache" : "v_cache",
              " must not be expanded to be written to");
  }
}

// The values of the integer tensors: no slot outside the cache is read or written.
inline void check_slots(const CacheArgs& a, const KVCache& cache) {
  const int64_t pages = a.k_cache.size(0);
  for (int64_t b = 0; b < cache.batch; ++b) {
    a.require(cache.seqlens[b] >= 0 && cache.end(b) <= cache.capacity,
              "cache_seqlens must be between 0 and the cache's ", cache.capacity, " slots, ",
              cache.appended, " new tokens included, got ", cache.seqlens[b]);
    a.require(cache.first_slot(b) >= 0, "cache_leftpad must be >= 0, got ", cache.first_slot(b));
    if (!cache.block_table) continue;
    const int32_t* page = cache.block_table + b * cache.table_batch;
    for (int64_t slot = 0; slot < cache.end(b); slot += cache.page_size, ++page) {
      a.require(0 <= *page && *page < pages, "block_table must name pages between 0 and ",
                pages - 1, ", got ", *page);
    }
  }
}

// like: q, or the new keys of an append.
inline KVCache cache_of(const CacheArgs& a, const Tensor& like) {
  const Tensor &k = a.k_cache, &v = a.v_cache;
  KVCache cache{};
  cache.dtype = dtype_of(a.op, like);
  check_tensor(a, a.op[0] == 'd' ? "q" : "k", like, like);
  check_tensor(a, "k_cache", k, like);
  check_tensor(a, "v_cache", v, like);
  cache.batch = like.size(0), cache.heads = k.size(2), cache.head_dim = like.size(3);
  const bool paged = a.block_table.has_value();
  a.require(k.size(3) == cache.head_dim && (paged || k.size(0) == cache.batch), "k_cache must be (",
            paged ? "num_blocks, block_size" : "batch, max_len", ", heads_k, ", cache.head_dim,
            "), got ", shape_of(k));
  for (int64_t i = 0; i < 4; ++i) {
    a.require(v.size(i) == k.size(i), "v_cache must have k_cache's shape ", shape_of(k), ", got ",
              shape_of(v));
  }
  a.require(cache.head_dim % 8 == 0 && 8 <= cache.head_dim && cache.head_dim <= kMaxHeadDim,
            "head_dim must be a multiple of 8 up to ", kMaxHeadDim,
            " (backend='reference' takes any), got ", cache.head_dim);
  check_new(a, like);
  cache.appended = a.k.has_value() ? a.k->size(1) : 0;
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

// Holds the padded rows that `params` points to.
struct FrequencyRows {
  PaddedRows inv_freq, log_decay;
  Frequencies params;
};

inline FrequencyRows frequencies_of(const CacheArgs& a, const KVCache& cache) {
  check_frequencies(a.op, cache.head_dim, cache.batch, a.inv_freq, a.log_decay);
  FrequencyRows out{padded_rows(a.inv_freq), {}, {}};
  if (a.log_decay.has_value()) out.log_decay = padded_rows(*a.log_decay);
  out.params = {out.inv_freq.values.data(),
                a.log_decay.has_value() ? out.log_decay.values.data() : nullptr, out.inv_freq.half,
                out.inv_freq.rows > 1 ? out.inv_freq.padded : 0, a.interleaved};
  return out;
}

}  // namespace extrope::decode
