// A key/value cache in plain data, for CPU and CUDA kernels, free of torch.
#pragma once

#include <cstdint>

#include "common/token_params.h"

namespace extrope {

// Rows of dims, by sequence (or page of a paged cache), token and head. Strides in elements; the
// last dimension is contiguous. Tokens of packed sequences have one count: block is 0.
struct Plane {
  void* data;
  int64_t block, slot, head;
};

struct KVCache {
  DType dtype;                     // of queries and new tokens, and of the cache unless it is e4m3
  const float *k_scale, *v_scale;  // per head, if the cache is e4m3; else nullptr
  Plane k, v;
  int64_t batch, heads, head_dim, head_dim_v;
  int64_t capacity;            // slots per sequence
  const int32_t* block_table;  // nullptr: one block per sequence
  int64_t table_batch, page_size;
  const int32_t* seqlens;  // slots in use, left padding included
  const int32_t* leftpad;  // nullptr: none
  int64_t appended;        // tokens that the call writes to each, after seqlens
  const int32_t* cu_new;   // (batch + 1,) boundaries of new tokens if packed, or nullptr

  bool is_e4m3() const { return k_scale != nullptr; }
  int64_t first_slot(int64_t b) const { return leftpad ? leftpad[b] : 0; }
  int64_t first_new(int64_t b) const { return cu_new ? cu_new[b] : b * appended; }
  int64_t new_tokens(int64_t b) const { return cu_new ? cu_new[b + 1] - cu_new[b] : appended; }
  int64_t all_new_tokens() const { return cu_new ? cu_new[batch] : batch * appended; }
  int64_t end(int64_t b) const { return seqlens[b] + new_tokens(b); }
};

}  // namespace extrope
