// The tokens that a call writes into a key/value cache.
#pragma once

#include <cstdint>
#include <vector>

#include "common/kv_cache.h"

namespace extrope {

// The element that the row of each new token starts at in k and v; -1: written nowhere.
struct CacheRows {
  std::vector<int64_t> k, v;

  explicit CacheRows(int64_t tokens) : k(tokens, -1), v(tokens, -1) {}
  void set(const KVCache& cache, int64_t token, int64_t block, int64_t slot) {
    k[token] = block * cache.k.block + slot * cache.k.slot;
    v[token] = block * cache.v.block + slot * cache.v.slot;
  }
};

// Of `tokens` tokens, behind those in use; of packed tokens the last may belong to no sequence.
inline CacheRows rows_behind(const KVCache& cache, int64_t tokens) {
  CacheRows rows(tokens);
  for (int64_t b = 0; b < cache.batch; ++b) {
    const int64_t first = cache.first_new(b), count = cache.new_tokens(b);
    const int32_t* pages = cache.block_table ? cache.block_table + b * cache.table_batch : nullptr;
    const int64_t start = cache.seqlens[b];
    int64_t page = pages ? start / cache.page_size : 0, slot = start - page * cache.page_size;
    for (int64_t t = 0; t < count; ++t, ++slot) {
      if (pages && slot == cache.page_size) slot = 0, ++page;
      rows.set(cache, first + t, pages ? pages[page] : b, slot);
    }
  }
  return rows;
}

}  // namespace extrope
