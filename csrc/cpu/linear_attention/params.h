// What a kernel of decayed linear attention needs to know, in plain data.
//
// A chunkwise scan is the one operation that the forward and every gradient are made of; its
// formula is in extrope_kernels/ops/linear_attention/scan.py.
#pragma once

#include <cstdint>

#include "common/rope_params.h"

namespace extrope {

struct PermuteParams;
struct PermuteCycles;

// (batch, seqlen, heads, dim), the last dimension contiguous; strides in elements. Packed sequences
// have no batch: its stride is 0. Absent where data is nullptr.
struct ScanTensor {
  void* data;
  int64_t batch, seq, head;
  int64_t heads;
};

// One number a row, float (batch, heads, seqlen), contiguous; nullptr: 1.
struct RowNumbers {
  float* data;
  int64_t heads;
};

struct ScanParams {
  DType dtype;
  int64_t batch, seqlen;  // packed: batch 1, seqlen the number of tokens
  int64_t heads;          // states
  int64_t score_dim, value_dim;
  ScanTensor q, k, v, out, gate;
  RowNumbers q_scale, q_extra, k_scale, k_extra;
  bool extra;       // q_extra * k_extra is part of a score
  bool phi_scores;  // the feature map is applied to q and k; else to v
  bool causal, reverse;
  bool out_is_float;  // else out is like q
  float* den;         // (batch, q.heads, seqlen): divide by it and write it; nullptr: do neither

  // Powers of permutations by which q and k are permuted, a permutation for each head of k;
  // nullptr: they are not.
  const PermuteParams* permute;
  const PermuteCycles* cycles;

  const float* decay;         // (heads,), nullptr: 1
  const int32_t* cu_seqlens;  // (num_sequences + 1,), nullptr when not packed
  int64_t num_sequences;

  // States before the first token and after the last, (sequences, heads, score_dim, value_dim) and
  // (sequences, heads, score_dim); nullptr: zero, and not wanted.
  const float *first_state, *first_sum;
  float *last_state, *last_sum;
};

// Consecutive tokens of one sequence in the order in which they are visited, for one state.
struct ScanPart {
  int64_t sequence, head;
  int64_t batch, token, length;  // of the sequence: its batch entry, first token and tokens
  int64_t first, count;
};

}  // namespace extrope
