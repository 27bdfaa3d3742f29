// Attention of a few query tokens over a key/value cache on the CPU: split-KV, one kernel for each
// instruction set that attention_decode_kernel.cpp is compiled for.
#pragma once

#include <cstdint>

#include "common/rope_params.h"

namespace extrope {

// Strides in elements; the last dimension is contiguous. `block` steps over sequences, or over the
// pages of a paged cache.
struct CachePlane {
  const void* data;
  int64_t block, slot, head;
};

struct DecodeParams {
  DType dtype;  // all but f64
  const void* q;
  int64_t q_batch, q_seq, q_head;
  int64_t batch, seqlen_q, heads_q, heads_k, head_dim;

  CachePlane k, v;
  const int32_t* block_table;  // nullptr: one block a sequence
  int64_t table_batch, page_size;

  const double* inv_freq;                 // rows of `half` frequencies, each padded to freq_stride
  int64_t half, freq_stride, freq_batch;  // freq_batch: 0 where all sequences share one row
  bool interleaved;

  int64_t window;
  double factor;
  bool grouped;
  double scale;      // of all logits, log2(e) included
  double log_n;      // rows times max(1, ln(position + 1) / ln(log_n)); 0: not
  double amplitude;  // of rotated lanes, once for q and k together

  float* partial;  // rows of head_dim sums and two more, largest logit and sum of weights
  void* out;       // contiguous (batch, seqlen_q, heads_q, head_dim)
  float* lse;      // contiguous (batch, heads_q, seqlen_q)
};

// All heads at the tokens first_token..last_token-1 of one sequence. Row r belongs to
// head_k = r / (tokens * group); within its rows, token and head of the group are counted
// row-major.
struct DecodeRows {
  int64_t batch, first_token, last_token;
  int64_t slot;    // of position 0 in the cache
  int64_t length;  // keys of the sequence; the last query stands at length - 1
  int64_t split;   // keys of a part
  int64_t parts;
  int64_t partial;  // row of the first part in DecodeParams::partial
};

struct DecodePart {
  const DecodeRows* rows;
  int64_t index;
};

#define EXTROPE_DECLARE(isa)                                                      \
  void decode_parts_##isa(const DecodeParams&, const DecodePart*, int64_t count); \
  void merge_parts_##isa(const DecodeParams&, const DecodeRows*, int64_t count);

EXTROPE_DECLARE(baseline)
EXTROPE_DECLARE(avx2)
EXTROPE_DECLARE(avx512)

#undef EXTROPE_DECLARE

}  // namespace extrope
