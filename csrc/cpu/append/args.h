// What the values of the arguments of `rope_append` have to be, before anything is written, and the
// rows of new tokens in the cache.
#pragma once

#include "common/append_args.h"
#include "cpu/append/cache.h"

namespace extrope::append {

// No slot outside the cache is written.
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
  const TensorView& x = *a.slot_mapping;
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
  const TensorView& x = slots_of(a);
  if (x.scalar_type() == ScalarType::Int) {
    return rows_at(a, cache, static_cast<const int32_t*>(x.data_ptr()));
  }
  return rows_at(a, cache, static_cast<const int64_t*>(x.data_ptr()));
}

}  // namespace extrope::append
