// What an attention kernel needs to know, in plain data, and where the regions of a row lie.
//
// The regions are those of extrope_kernels/ops/attention/regions.py.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/rope_params.h"

namespace extrope {

constexpr int kMaxRegions = 3;

// (batch, seqlen, heads, head_dim), the last dimension contiguous; strides in elements. Packed
// sequences have no batch: its stride is 0.
struct AttentionTensor {
  void* data;
  int64_t batch, seq, head;
};

// By what rows turn as they are read: for each token a row of cosines, then as many sines.
struct AttentionTurn {
  const float* table;  // nullptr: the rows come turned
  int64_t batch, seq;  // strides
};

struct AttentionParams {
  DType dtype;
  int64_t batch, seqlen_q, seqlen_k;  // packed: batch 1, both seqlens the number of tokens
  int64_t heads_q, heads_k, head_dim;

  int64_t regions;
  int64_t starts[kMaxRegions];
  int64_t granularity;
  float softmax_scale;
  const float* row_scale;     // (seqlen_q,) or nullptr
  const int32_t* cu_seqlens;  // (num_sequences + 1,) token boundaries, nullptr when not packed
  int64_t num_sequences;

  AttentionTensor q[kMaxRegions], k[kMaxRegions];
  // Where q turns, its regions share one tensor; where k turns too, so do those of k, dq and dk.
  AttentionTurn q_turn[kMaxRegions], k_turn[kMaxRegions];
  int64_t half;  // pairs of lanes that turn
  bool interleaved;
  AttentionTensor v, out;
  float* lse;  // (batch, heads_q, seqlen_q), contiguous

  // Backward alone. dlse is shaped like lse, or nullptr; dq, dk and dv are float.
  AttentionTensor dout;
  const float* dlse;
  AttentionTensor dq[kMaxRegions], dk[kMaxRegions];
  AttentionTensor dv;
};

// Consecutive rows of one sequence, for the q heads that share one head of k.
struct QueryTile {
  int64_t batch, head;         // head of k
  int64_t token_q, token_k;    // the sequence's first token
  int64_t seqlen_q, seqlen_k;  // of the sequence
  int64_t row, rows;           // within the sequence
};

// The first key of region r (for r == regions the first key behind the diagonal) that the query at
// absolute position `position` sees.
inline int64_t region_start(const AttentionParams& p, int64_t r, int64_t position) {
  if (position < 0) return 0;
  if (r >= p.regions) return position + 1;
  // A division takes longer than all the rest.
  const int64_t block = p.granularity == 1 ? position : position / p.granularity * p.granularity;
  const int64_t start = block + p.starts[r];
  return std::clamp<int64_t>(start, 0, position + 1);
}

}  // namespace extrope
