// What the kernels over a key/value cache need to know, in plain data.
#pragma once

#include <cstdint>

#include "common/regions.h"
#include "common/rope_params.h"
#include "common/softmax_params.h"

namespace extrope {

// Rows of dims, by sequence (or page of a paged cache), token and head. Strides in elements; the
// last dimension is contiguous. The tokens of packed sequences are counted through: block is 0.
struct Plane {
  void* data;
  int64_t block, slot, head;
};

struct KVCache {
  DType dtype;  // all but f64
  Plane k, v;
  int64_t batch, heads, head_dim, head_dim_v;
  int64_t capacity;            // slots of a sequence
  const int32_t* block_table;  // nullptr: one block a sequence
  int64_t table_batch, page_size;
  const int32_t* seqlens;  // slots in use, those of left padding among them
  const int32_t* leftpad;  // nullptr: none
  int64_t appended;        // tokens that the call writes to each, to be added to seqlens
  const int32_t* cu_new;   // (batch + 1,) boundaries of tokens that it writes packed, or nullptr

  int64_t first_slot(int64_t b) const { return leftpad ? leftpad[b] : 0; }
  int64_t new_tokens(int64_t b) const { return cu_new ? cu_new[b + 1] - cu_new[b] : appended; }
  int64_t all_new_tokens() const { return cu_new ? cu_new[batch] : batch * appended; }
  int64_t end(int64_t b) const { return seqlens[b] + new_tokens(b); }
};

struct Frequencies {
  const double* inv_freq;   // rows of `half` frequencies, each padded to whole vectors
  const double* log_decay;  // one such row, or nullptr
  int64_t half, batch;      // batch: from one sequence's row to the next; 0 where all share one
  bool interleaved;
};

struct AppendParams {
  KVCache cache;
  Frequencies freqs;
  PositionMap stored;  // by which keys are rotated
  Plane k, v;          // new keys, raw, and values
};

struct DecodeParams {
  KVCache cache;
  Frequencies freqs;
  Regions regions;
  const void* q;
  int64_t q_batch, q_seq, q_head;
  int64_t seqlen_q, heads_q;
  const int32_t* cu_seqlens_q;  // boundaries of packed queries, seqlen_q in all, or nullptr

  double scale;      // of all logits: over softcap, or log2(e) included
  float softcap;     // log2(e) included; 0: none
  double log_n;      // rows times max(1, ln(position + 1) / ln(log_n)); 0: not
  double amplitude;  // of rotated dims, once for q and k together
  QueryScale query_scale;
  Sinks sinks;

  float* partial;  // rows of head_dim_v sums and two more, row_max and row_sum
  void* out;       // contiguous (batch, seqlen_q, heads_q, head_dim_v)
  float* lse;      // contiguous (batch, heads_q, seqlen_q)
};

// All heads at the tokens first_token..last_token-1 of one sequence. Row r belongs to
// head_k = r / (tokens * group); within its rows, token and head of the group are counted
// row-major.
struct QueryBlock {
  int64_t sequence;  // of the cache
  int64_t batch;     // of q and the results: 0 where they are packed
  int64_t first_token, last_token;
  int64_t first_position;  // of first_token
  int64_t first_slot;      // of position 0 in the cache
  int64_t first_key;       // that any row sees
  int64_t split_size;      // keys of a split
  int64_t num_splits;
  int64_t partial;  // row of the first split in DecodeParams::partial
};

struct Split {
  const QueryBlock* queries;
  int64_t index;
  int64_t middle;  // of its work, among the work of all splits in their order
};

}  // namespace extrope
