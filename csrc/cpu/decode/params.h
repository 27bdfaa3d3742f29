// What the kernels over a key/value cache need to know, in plain data.
#pragma once

#include <cstdint>

#include "common/regions.h"
#include "common/rope_params.h"
#include "common/softmax_params.h"
#include "cpu/append/cache.h"

namespace extrope {

struct Frequencies {
  const double* inv_freq;   // rows of `half` frequencies, each padded to whole vectors
  const double* log_decay;  // one such row, or nullptr
  int64_t half, padded;
  int64_t batch;  // from one sequence's rows to the next; 0 where all share them
  bool interleaved;
  int64_t heads = 1;  // of k, whose rows follow each other; 1: all share one

  int64_t head() const { return heads > 1 ? padded : 0; }  // from one head's row to the next
};

struct DecodeParams {
  KVCache cache;
  Frequencies freqs;
  Regions regions;
  const void* q;
  int64_t q_batch, q_seq, q_head;
  int64_t seqlen_q, heads_q;
  const int32_t* cu_seqlens_q;  // boundaries of packed queries, seqlen_q in all, or nullptr

  double softmax_scale;
  double softcap;    // 0: none
  double log_n;      // rows times max(1, ln(position + 1) / ln(log_n)); 0: not
  double amplitude;  // of rotated dims, once for q and k together
  QueryScale query_scale;
  Sinks sinks;

  float* partial;  // rows of head_dim_v sums and two more, row_max and row_sum
  void* out;       // contiguous (batch, seqlen_q, heads_q, head_dim_v)
  float* lse;      // contiguous (batch, heads_q, seqlen_q)

  // Heads of k with rows of cosines and sines of their own by a map; 1: all share them.
  int64_t heads_of(const PositionMap& map) const {
    return freqs.heads > 1 || regions.pair_maps.differ_by_head(map) ? cache.heads : 1;
  }
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
