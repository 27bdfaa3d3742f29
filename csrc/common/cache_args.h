// Checks and reads the tensors of a key/value cache, for all ops over one. All checks come before
// any write.
#pragma once

#include <cmath>
#include <initializer_list>
#include <vector>

#include "common/kv_cache.h"
#include "common/tensor_args.h"

namespace extrope {

// A cache, and the tokens of a call over it.
struct CacheArgs {
  const char* op;
  const char* name;           // of `like` in errors
  Tensor like;                // q or the new keys: the dtype, the tokens and the head_dim
  const char* boundaries;     // the name of cu_seqlens
  OptionalTensor cu_seqlens;  // of like's tokens, if they are packed
  Tensor k_cache, v_cache;
  OptionalTensor k, v;  // to be written, or neither
  OptionalTensor cache_seqlens, block_table, cache_leftpad;
  OptionalTensor slot_mapping;  // of like's tokens: where to write them, instead of block_table
  OptionalTensor k_scale, v_scale;
  bool reads;  // the op reads the cache from its first slot on

  bool packed() const { return like.dim() == 3; }
  int64_t batch() const { return packed() ? 1 : like.size(0); }
  int64_t seqlen() const { return like.size(packed() ? 0 : 1); }
  template <typename... Message>
  void require(bool condition, const Message&... message) const {
    require_of(op, condition, message...);
  }
};

// The places of the rows of a cache, or of q, k and v, packed or not.
inline Plane plane(const Tensor& x) {
  const int64_t d = x.dim();
  return {x.data_ptr(), d == 4 ? x.stride(0) : 0, x.stride(d - 3), x.stride(d - 2)};
}

inline bool same_sizes(const Tensor& x, const Tensor& y, int64_t dims) {
  for (int64_t i = 0; i < dims; ++i) {
    if (x.size(i) != y.size(i)) return false;
  }
  return true;
}

// Returns int32 (rows,), or (rows, any number of blocks).
inline const int32_t* cache_ints(const CacheArgs& a, const char* name, const OptionalTensor& x,
                                 int64_t dim, int64_t rows) {
  if (!x.has_value()) return nullptr;
  a.require(x->get_device() == a.like.get_device() && x->scalar_type() == ScalarType::Int &&
                x->dim() == dim && x->size(0) == rows &&
                (x->numel() == 0 || x->size(dim - 1) == 1 || x->stride(dim - 1) == 1),
            name, " must be int32 (", rows, dim == 1 ? ",)" : ", max_blocks)",
            ", contiguous in its last dimension, on ", a.name, "'s device, got shape ",
            shape_of(*x));
  return static_cast<const int32_t*>(x->data_ptr());
}

inline const float* cache_scale(const CacheArgs& a, const char* name, const OptionalTensor& x) {
  if (!x.has_value()) return nullptr;
  const int64_t heads = a.k_cache.size(2);
  a.require(x->get_device() == a.like.get_device() && x->scalar_type() == ScalarType::Float &&
                x->dim() == 1 && x->size(0) == heads && x->is_contiguous(),
            name, " must be contiguous float32 (", heads, ",) on ", a.name, "'s device, got shape ",
            shape_of(*x));
  const float* scale = static_cast<const float*>(x->data_ptr());
  for (int64_t head = 0; head < heads; ++head) {
    a.require(scale[head] > 0 && std::isfinite(scale[head]), name,
              " must be positive numbers, got ", scale[head]);
  }
  return scale;
}

// Checks the boundaries: tokens past the last one are padding.
inline const int32_t* cache_boundaries(const CacheArgs& a) {
  if (!a.cu_seqlens.has_value()) return nullptr;
  const Tensor& x = *a.cu_seqlens;
  a.require(x.scalar_type() == ScalarType::Int && x.dim() == 1 && x.size(0) >= 2 &&
                x.is_contiguous() && x.get_device() == a.like.get_device(),
            a.boundaries, " must be contiguous int32 (sequences + 1,) on ", a.name,
            "'s device, got shape ", shape_of(x));
  const int32_t* cu = static_cast<const int32_t*>(x.data_ptr());
  const int64_t sequences = x.size(0) - 1;
  a.require(rise_from_zero(cu, sequences) && cu[sequences] <= a.seqlen(), a.boundaries,
            " must rise from 0 to ", a.name, "'s ", a.seqlen(), " tokens at most");
  return cu;
}

inline void check_cache(const CacheArgs& a, const char* name, const Tensor& cache) {
  check_rows(a.op, cache, false, name);
  const bool scaled = a.k_scale.has_value();
  const ScalarType type = scaled ? ScalarType::Float8_e4m3fn : a.like.scalar_type();
  a.require(cache.get_device() == a.like.get_device() && cache.scalar_type() == type, name,
            " must be of ",
            scaled ? "float8_e4m3fn with k_scale and v_scale" : "the other tensors' dtype",
            ", on their device");
}

// Checks keys or values to be written, the rows of like's tokens.
inline void check_new(const CacheArgs& a, const char* name, const Tensor& x, const char* cache_name,
                      const Tensor& cache) {
  check_rows(a.op, x, a.packed(), name);
  const int64_t d = x.dim();
  a.require(x.scalar_type() == a.like.scalar_type() && x.get_device() == a.like.get_device(), name,
            " must be of ", a.name, "'s dtype, on its device");
  a.require(same_sizes(x, a.like, d - 2), name, " must have ", a.name, "'s ",
            a.packed() ? "total: " : "batch and seqlen: ", shape_of(a.like), ", got ", shape_of(x));
  a.require(x.size(d - 2) == cache.size(2) && x.size(d - 1) == cache.size(3), name, " must have ",
            cache_name, "'s heads and head_dim (", cache.size(2), ", ", cache.size(3),
            "), got shape ", shape_of(x));
  a.require(!overlaps_itself(cache), cache_name, " must not be expanded to be written to");
}

// Checks the values of integer tensors: no slot outside the cache is read or written.
inline void check_slots(const CacheArgs& a, const KVCache& cache) {
  const int64_t pages = a.k_cache.size(0);
  for (int64_t b = 0; b < cache.batch; ++b) {
    a.require(cache.first_slot(b) >= 0, "cache_leftpad must be >= 0, got ", cache.first_slot(b));
    if (a.slot_mapping.has_value()) continue;
    const int64_t begin = a.reads ? 0 : cache.seqlens[b], end = cache.end(b);
    a.require(cache.seqlens[b] >= 0 && end <= cache.capacity,
              "cache_seqlens must be between 0 and the cache's ", cache.capacity, " slots, ",
              cache.new_tokens(b), " new tokens included, got ", cache.seqlens[b]);
    if (!cache.block_table || begin == end) continue;
    const int32_t* page = cache.block_table + b * cache.table_batch;
    for (int64_t n = begin / cache.page_size; n <= (end - 1) / cache.page_size; ++n) {
      a.require(0 <= page[n] && page[n] < pages, "block_table must name pages between 0 and ",
                pages - 1, ", got ", page[n]);
    }
  }
}

// Returns a call's cache, with all checks.
inline KVCache cache_of(const CacheArgs& a) {
  const Tensor &k = a.k_cache, &v = a.v_cache;
  const bool paged = a.block_table.has_value(), by_slots = a.slot_mapping.has_value();
  check_rows(a.op, a.like, a.packed(), a.name);
  a.require(a.packed() ? a.cu_seqlens.has_value() || by_slots : !a.cu_seqlens.has_value(), a.name,
            " must be (total, heads, head_dim) with ", a.boundaries, ", and only then, got shape ",
            shape_of(a.like));
  a.require(a.k_scale.has_value() == a.v_scale.has_value(),
            "k_scale and v_scale must be given together");
  check_cache(a, "k_cache", k), check_cache(a, "v_cache", v);
  const int32_t* cu = cache_boundaries(a);
  KVCache cache{};
  cache.dtype = dtype_of_rows(a.op, a.like, a.name);
  cache.batch = cu ? a.cu_seqlens->size(0) - 1 : a.batch();
  cache.heads = k.size(2), cache.head_dim = k.size(3), cache.head_dim_v = v.size(3);
  cache.k = plane(k), cache.v = plane(v);
  a.require(cache.head_dim == a.like.size(a.like.dim() - 1) &&
                (paged || by_slots || k.size(0) == cache.batch),
            "k_cache must be (", paged || by_slots ? "num_blocks, block_size" : "batch, max_len",
            ", heads_k, head_dim) for ", a.name, " ", shape_of(a.like), ", got ", shape_of(k));
  a.require(same_sizes(v, k, 3), "v_cache must have k_cache's shape ", shape_of(k),
            " but for the last dimension, got ", shape_of(v));
  cache.k_scale = cache_scale(a, "k_scale", a.k_scale);
  cache.v_scale = cache_scale(a, "v_scale", a.v_scale);
  a.require(a.k.has_value() == a.v.has_value(), "k and v must be given together, got ",
            a.k.has_value() ? "k" : "v", " alone");
  if (a.k.has_value()) {
    check_new(a, "k", *a.k, "k_cache", k), check_new(a, "v", *a.v, "v_cache", v);
    a.require(
        !share_memory(k, v),
        "k_cache and v_cache must be two tensors to be written to, got two that share memory");
    cache.cu_new = cu;
    cache.appended = cu ? 0 : a.seqlen();
  }
  a.require(!(paged && by_slots), "block_table and slot_mapping both say where to write");
  a.require(a.cache_seqlens.has_value() || by_slots,
            "cache_seqlens or slot_mapping must say where to write");
  cache.seqlens = cache_ints(a, "cache_seqlens", a.cache_seqlens, 1, cache.batch);
  cache.leftpad = cache_ints(a, "cache_leftpad", a.cache_leftpad, 1, cache.batch);
  cache.block_table = cache_ints(a, "block_table", a.block_table, 2, cache.batch);
  cache.page_size = cache.capacity = k.size(1);
  if (paged) {
    cache.table_batch = a.block_table->stride(0);
    cache.capacity *= a.block_table->size(1);
    a.require(cache.page_size > 0, "k_cache must have a block_size >= 1, got 0");
  }
  check_slots(a, cache);
  return cache;
}

}  // namespace extrope
