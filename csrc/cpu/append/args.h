// Converts the arguments of `rope_append` to a cache, the rows of new tokens in it, and their
// rotation. All checks come before any write.
#pragma once

#include <optional>
#include <vector>

#include "common/cache_args.h"
#include "common/map_args.h"
#include "common/rope_args.h"
#include "cpu/append/cache.h"

namespace extrope::append {

constexpr const char* kOp = "rope_append";

struct Args {
  OptionalTensor q;
  Tensor k, v, k_cache, v_cache;
  OptionalTensor cache_seqlens, block_table, slot_mapping, cu_seqlens, cache_leftpad;
  OptionalTensor k_scale, v_scale;

  bool packed() const { return k.dim() == 3; }
  int64_t batch() const { return packed() ? 1 : k.size(0); }
  int64_t seqlen() const { return k.size(packed() ? 0 : 1); }
  int64_t sequences() const { return cu_seqlens.has_value() ? cu_seqlens->size(0) - 1 : batch(); }
};

template <typename... Message>
void check(bool condition, const Message&... message) {
  require_of(kOp, condition, message...);
}

inline void check_cache(const Args& a, const char* name, const Tensor& cache, const Tensor& x) {
  check_rows(kOp, cache, false, name);
  check_cache_dtype(kOp, name, cache, a.k, a.k_scale.has_value());
  check(cache.size(2) == x.size(x.dim() - 2) && cache.size(3) == x.size(x.dim() - 1), name,
        " must have the heads and the head_dim of what is written, ", shape_of(x), ", got ",
        shape_of(cache));
  check(!overlaps_itself(cache), name, " must not be expanded to be written to");
}

inline void check_tensors(const Args& a) {
  const bool packed = a.k.dim() == 3;
  check_rows(kOp, a.k, packed, "k");
  check_rows(kOp, a.v, packed, "v");
  check(!packed || a.cu_seqlens.has_value() || a.slot_mapping.has_value(),
        "packed k needs cu_seqlens or slot_mapping");
  check(packed || !a.cu_seqlens.has_value(), "k must be (total, heads, head_dim) with cu_seqlens");
  check(a.v.scalar_type() == a.k.scalar_type() && a.v.get_device() == a.k.get_device(),
        "v must be of k's dtype, on its device");
  for (int64_t i = 0; i + 1 < a.k.dim(); ++i) {
    check(a.v.size(i) == a.k.size(i), "v must have k's tokens and heads ", shape_of(a.k), ", got ",
          shape_of(a.v));
  }
  if (a.q.has_value()) {
    check_rows(kOp, *a.q, packed, "q");
    check_matching(kOp, *a.q, a.k, "q");
  }
  check_cache(a, "k_cache", a.k_cache, a.k);
  check_cache(a, "v_cache", a.v_cache, a.v);
  check(a.v_cache.size(0) == a.k_cache.size(0) && a.v_cache.size(1) == a.k_cache.size(1),
        "v_cache must have k_cache's blocks and slots ", shape_of(a.k_cache), ", got ",
        shape_of(a.v_cache));
}

inline const int32_t* ints(const Args& a, const char* name, const OptionalTensor& x, int64_t dim,
                           int64_t rows) {
  if (!x.has_value()) return nullptr;
  check(x->get_device() == a.k.get_device() && x->scalar_type() == ScalarType::Int &&
            x->dim() == dim && x->size(0) == rows &&
            (x->numel() == 0 || x->size(dim - 1) == 1 || x->stride(dim - 1) == 1),
        name, " must be int32 (", rows, dim == 1 ? ",)" : ", max_blocks)",
        ", contiguous in its last dimension, on k's device, got shape ", shape_of(*x));
  return static_cast<const int32_t*>(x->data_ptr());
}

inline const int32_t* boundaries_of(const Args& a) {
  if (!a.cu_seqlens.has_value()) return nullptr;
  check(a.cu_seqlens->dim() == 1 && a.cu_seqlens->size(0) >= 2,
        "cu_seqlens must be int32 (sequences + 1,), got shape ", shape_of(*a.cu_seqlens));
  return ints(a, "cu_seqlens", a.cu_seqlens, 1, a.cu_seqlens->size(0));
}

inline KVCache cache_of(const Args& a) {
  check_tensors(a);
  const bool by_slots = a.slot_mapping.has_value();
  KVCache cache{};
  cache.dtype = rotated_dtype(a.k, "k");
  set_cache_scales(kOp, a.k_scale, a.v_scale, a.k_cache.size(2), a.k, cache);
  cache.k = plane(a.k_cache), cache.v = plane(a.v_cache);
  cache.heads = a.k_cache.size(2);
  cache.head_dim = a.k_cache.size(3), cache.head_dim_v = a.v_cache.size(3);
  cache.cu_new = boundaries_of(a);
  cache.batch = a.sequences();
  cache.appended = cache.cu_new ? 0 : a.seqlen();
  cache.seqlens = ints(a, "cache_seqlens", a.cache_seqlens, 1, cache.batch);
  cache.leftpad = ints(a, "cache_leftpad", a.cache_leftpad, 1, cache.batch);
  cache.page_size = cache.capacity = a.k_cache.size(1);
  check(!by_slots || !a.block_table.has_value(),
        "block_table and slot_mapping both say where to write");
  if (by_slots) return cache;
  check(a.cache_seqlens.has_value(), "cache_seqlens or slot_mapping must say where to write");
  cache.block_table = ints(a, "block_table", a.block_table, 2, cache.batch);
  if (a.block_table.has_value()) {
    cache.table_batch = a.block_table->stride(0);
    cache.capacity *= a.block_table->size(1);
    check(cache.page_size > 0, "k_cache must have a block_size >= 1, got 0");
  } else {
    check(a.k_cache.size(0) == cache.batch, "k_cache must be (batch, max_len, heads, head_dim) ",
          "without block_table, of batch ", cache.batch, ", got ", shape_of(a.k_cache));
  }
  return cache;
}

// Returns slot_mapping, the slots of k's tokens.
inline const Tensor& slots_of(const Args& a) {
  const Tensor& x = *a.slot_mapping;
  bool fits = x.get_device() == a.k.get_device() && x.dim() == a.k.dim() - 2;
  for (int64_t i = 0; fits && i < x.dim(); ++i) fits = x.size(i) == a.k.size(i);
  check(fits, "slot_mapping must have k's tokens ", shape_of(a.k), ", on its device, got shape ",
        shape_of(x));
  check(x.scalar_type() == ScalarType::Int || x.scalar_type() == ScalarType::Long,
        "slot_mapping must be int32 or int64");
  return x;
}

// The rotation and scale of q and k.
struct Rotation {
  OptionalTensor inv_freq, positions, q_norm_weight, k_norm_weight;
  RopeOptions options;
  std::optional<PositionMap> stored;  // by which a score method stores keys; q is then not rotated
  double norm_eps;
};

// Checks that no slot outside the cache is written.
inline void check_slots(const KVCache& cache, int64_t pages) {
  for (int64_t b = 0; b < cache.batch; ++b) {
    check(cache.seqlens[b] >= 0 && cache.end(b) <= cache.capacity,
          "cache_seqlens must be between 0 and the cache's ", cache.capacity, " slots, ",
          cache.new_tokens(b), " new tokens included, got ", cache.seqlens[b]);
    if (!cache.block_table || cache.new_tokens(b) == 0) continue;
    const int32_t* page = cache.block_table + b * cache.table_batch;
    const int64_t last = (cache.end(b) - 1) / cache.page_size;
    for (int64_t n = cache.seqlens[b] / cache.page_size; n <= last; ++n) {
      check(0 <= page[n] && page[n] < pages, "block_table must name pages between 0 and ",
            pages - 1, ", got ", page[n]);
    }
  }
}

inline KVCache checked_cache_of(const Args& a) {
  const KVCache cache = cache_of(a);
  check_cache_scales(kOp, cache);
  const int32_t* cu = cache.cu_new;
  check(!cu || (rise_from_zero(cu, a.sequences()) && cu[a.sequences()] <= a.seqlen()),
        "cu_seqlens must rise from 0 to the ", a.seqlen(), " tokens at most");
  for (int64_t b = 0; b < cache.batch; ++b) {
    check(cache.first_slot(b) >= 0, "cache_leftpad must be >= 0, got ", cache.first_slot(b));
  }
  if (!a.slot_mapping.has_value()) check_slots(cache, a.k_cache.size(0));
  return cache;
}

template <typename Int>
CacheRows rows_at(const Args& a, const KVCache& cache, const Int* slots) {
  const Tensor& x = *a.slot_mapping;
  const int64_t last = x.dim() - 1, all = a.k_cache.size(0) * cache.page_size;
  CacheRows rows(a.batch() * a.seqlen());
  for (int64_t b = 0, n = 0; b < a.batch(); ++b) {
    for (int64_t t = 0; t < a.seqlen(); ++t, ++n) {
      const int64_t slot = slots[(last > 0 ? b * x.stride(0) : 0) + t * x.stride(last)];
      check(-1 <= slot && slot < all, "slot_mapping must be -1 or one of the cache's ", all,
            " slots, got ", slot);
      if (slot >= 0) rows.set(cache, n, slot / cache.page_size, slot % cache.page_size);
    }
  }
  return rows;
}

inline CacheRows rows_of(const Args& a, const KVCache& cache) {
  if (!a.slot_mapping.has_value()) return rows_behind(cache, a.batch() * a.seqlen());
  const Tensor& x = slots_of(a);
  if (x.scalar_type() == ScalarType::Int) {
    return rows_at(a, cache, static_cast<const int32_t*>(x.data_ptr()));
  }
  return rows_at(a, cache, static_cast<const int64_t*>(x.data_ptr()));
}

}  // namespace extrope::append
