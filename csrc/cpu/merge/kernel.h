// The CPU kernels that merge attention over disjoint sets of keys, one for each instruction set
// that merge_kernel.cpp is compiled for.
#pragma once

#include <cstdint>

#include "common/token_params.h"

namespace extrope {

// Attention over one set of keys, or over all of them. Strides are in elements; the last dimension
// of out is contiguous.
struct MergeRows {
  void* out;  // (batch, seqlen, heads, head_dim)
  int64_t out_batch, out_seq, out_head;
  DType dtype;
  void* lse;  // (batch, heads, seqlen)
  int64_t lse_batch, lse_head, lse_seq;
};

struct MergeParams {
  const MergeRows* sets;
  int64_t num_sets;
  MergeRows merged;  // may be the first of the sets
  bool in_place;     // rows without keys in any set stay as they are
  bool lse_is_f64;
  bool wide;  // compute in double
  int64_t batch, seqlen, heads, head_dim;
};

// Merges the tokens begin..end-1 of the batch * seqlen tokens in row-major order.
using MergeTokens = void (*)(const MergeParams&, int64_t begin, int64_t end);

void merge_tokens_baseline(const MergeParams&, int64_t, int64_t);
void merge_tokens_avx2(const MergeParams&, int64_t, int64_t);
void merge_tokens_avx512(const MergeParams&, int64_t, int64_t);
void merge_tokens_neon(const MergeParams&, int64_t, int64_t);

}  // namespace extrope
