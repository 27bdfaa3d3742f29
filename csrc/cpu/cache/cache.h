// The places of new tokens in a key/value cache.
#pragma once

#include <cstdint>
#include <vector>

#include "common/kv_cache.h"

namespace extrope {

// The first element of each new token's row in k and v; -1: not written.
struct CacheRows {
  std::vector<int64_t> k, v;

  explicit CacheRows(int64_t tokens) : k(tokens, -1), v(tokens, -1) {}
  void set(const KVCache& cache, int64_t token, int64_t block, int64_t slot) {
    k[token] = block * cache.k.block + slot * cache.k.slot;
    v[token] = block * cache.v.block + slot * cache.v.slot;
  }
};

// Returns the rows of `tokens` tokens after the slots in use. The last packed tokens may belong to
// no sequence.
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

// Returns the positions of `tokens` tokens after those in use; tokens after the last sequence
// continue its positions.
inline std::vector<int64_t> positions_behind(const KVCache& cache, int64_t tokens) {
  std::vector<int64_t> positions(tokens);
  for (int64_t b = 0; b < cache.batch; ++b) {
    const int64_t first = cache.first_new(b), start = cache.seqlens[b] - cache.first_slot(b);
    const int64_t end = b + 1 < cache.batch ? first + cache.new_tokens(b) : tokens;
    for (int64_t n = first; n < end; ++n) positions[n] = start + n - first;
  }
  return positions;
}

}  // namespace extrope
