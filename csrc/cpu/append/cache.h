// A key/value cache and the tokens that a call writes into it, in plain data.
#pragma once

#include <cstdint>
#include <vector>

#include "common/token_params.h"

namespace extrope {

// Rows of dims, by sequence (or page of a paged cache), token and head. Strides in elements; the
// last dimension is contiguous. The tokens of packed sequences are counted through: block is 0.
struct Plane {
  void* data;
  int64_t block, slot, head;
};

struct KVCache {
  DType dtype;  // of queries and new tokens; and of what is cached, unless that is e4m3
  const float *k_scale, *v_scale;  // of each head, where the cache is e4m3: else nullptr
  Plane k, v;
  int64_t batch, heads, head_dim, head_dim_v;
  int64_t capacity;            // slots of a sequence
  const int32_t* block_table;  // nullptr: one block a sequence
  int64_t table_batch, page_size;
  const int32_t* seqlens;  // slots in use, those of left padding among them
  const int32_t* leftpad;  // nullptr: none
  int64_t appended;        // tokens that the call writes to each, to be added to seqlens
  const int32_t* cu_new;   // (batch + 1,) boundaries of tokens that it writes packed, or nullptr

  bool is_e4m3() const { return k_scale != nullptr; }
  int64_t first_slot(int64_t b) const { return leftpad ? leftpad[b] : 0; }
  int64_t first_new(int64_t b) const { return cu_new ? cu_new[b] : b * appended; }
  int64_t new_tokens(int64_t b) const { return cu_new ? cu_new[b + 1] - cu_new[b] : appended; }
  int64_t all_new_tokens() const { return cu_new ? cu_new[batch] : batch * appended; }
  int64_t end(int64_t b) const { return seqlens[b] + new_tokens(b); }
};

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
