// The arguments of kernels over a key/value cache, in plain data.
#pragma once

#include <cstdint>

#include "common/kv_cache.h"
#include "common/regions.h"
#include "common/rope_params.h"
#include "common/softmax_params.h"

namespace extrope {

struct Frequencies {
  const double* inv_freq;   // rows of `half` frequencies, each padded to whole vectors
  const double* log_decay;  // one padded row, or nullptr
  int64_t half, padded;
  int64_t batch;  // stride of sequences' rows; 0 if all share them
  bool interleaved;
  int64_t rotary_offset;
  int64_t heads = 1;  // heads of k, with contiguous rows; 1: all share one

  RowRotation of_rows(int64_t head_dim) const {
    return {head_dim, half, rotary_offset, interleaved};
  }
  int64_t head() const { return heads > 1 ? padded : 0; }  // stride of heads' rows
};

struct DecodeParams : SoftmaxParams {
  KVCache cache;
  Frequencies freqs;
  Regions regions;
  const void* q;
  int64_t q_stride_batch, q_stride_seq, q_stride_head;
  int64_t seqlen_q, heads_q;
  const int32_t* cu_seqlens_q;  // boundaries of packed queries, seqlen_q in all, or nullptr

  double amplitude;  // of rotated dims, for q and k together

  float* partial;  // rows of head_dim_v sums, then row_max and row_sum
  void* out;       // contiguous (batch, seqlen_q, heads_q, head_dim_v)
  float* lse;      // contiguous (batch, heads_q, seqlen_q)
};

// All heads of the tokens first_token..last_token-1 of one sequence. Row r belongs to
// head_k = r / (tokens * group); within its rows, the order is token, then head of the group.
struct QueryBlock {
  int64_t sequence;  // index in the cache
  int64_t batch;     // index in q and the results; 0 if they are packed
  int64_t first_token, last_token;
  int64_t first_position;  // position of first_token
  int64_t first_slot;      // cache slot of position 0
  int64_t first_key;       // first key that any row sees
  int64_t split_size;      // keys per split
  int64_t num_splits;
  int64_t partial;  // the first split's row in DecodeParams::partial
};

struct Split {
  const QueryBlock* queries;
  int64_t index;
  int64_t middle;  // the middle of its work in the ordered work of all splits
};

}  // namespace extrope
