// The arguments of an attention kernel in plain data.
#pragma once

#include <cstdint>

#include "common/regions.h"
#include "common/rope_params.h"
#include "common/softmax_params.h"

namespace extrope {

// (batch, seqlen, heads, head_dim), the last dimension contiguous; strides in elements. Packed
// sequences have no batch: its stride is 0.
struct AttentionTensor {
  void* data;
  int64_t stride_batch, stride_seq, stride_head;
  int64_t head_dim;
  const int64_t* rows = nullptr;  // each token's first element, in place of stride_seq
  bool is_e4m3 = false;           // cached keys or values, with any AttentionParams::dtype

  [[gnu::always_inline]] int64_t at(int64_t token) const {
    return rows ? rows[token] : token * stride_seq;
  }
};

// Absolute positions of the first token of each sequence.
struct Starts {
  const int32_t* data;     // nullptr: all 0
  int64_t stride, offset;  // `offset` is added to all

  [[gnu::always_inline]] int64_t of(int64_t sequence) const {
    return (data ? data[sequence * stride] : 0) + offset;
  }
};

// The cosines and sines of each token's pairs, which rotate rows as they are read.
struct CosSin {
  const float *cos, *sin;  // nullptr: no rotation
  int64_t stride_batch, stride_seq;
  int64_t stride_head;  // of heads of k; 0: all rotate alike
};

struct AttentionParams : SoftmaxParams {
  DType dtype;
  int64_t batch, seqlen_q, seqlen_k;   // packed: batch 1, both seqlens the number of tokens
  int64_t heads_q, heads_k, head_dim;  // head_dim of q and k

  Regions regions;
  Starts q_start, k_start;
  const int32_t* cu_seqlens;  // (num_sequences + 1,) token boundaries, nullptr if not packed
  int64_t num_sequences;

  AttentionTensor q, v, out;
  bool float32_out;                // out is float; else out is of `dtype`
  AttentionTensor k[kMaxRegions];  // raw if k_cos_sin rotates it
  CosSin q_cos_sin[kMaxRegions], k_cos_sin[kMaxRegions];
  RowRotation rotation;            // of q and k
  const float *k_scale, *v_scale;  // per head of k, or nullptr
  float* lse;                      // (batch, heads_q, seqlen_q)
  int64_t lse_head;                // its stride of heads; batches are contiguous

  // Only for the backward. dlse is shaped like lse, or nullptr; dq, dk and dv are float.
  AttentionTensor dout, dq, dk, dv;
  const float* dlse;
};

// Consecutive tokens of one sequence, with the q heads that share one head of k.
struct QueryTile {
  int64_t batch, head;         // head of k
  int64_t first_q, first_k;    // the sequence's first token
  int64_t seqlen_q, seqlen_k;  // of the sequence
  int64_t q_start, k_start;    // positions of its first tokens
  int64_t token, tokens;       // within the sequence
};

}  // namespace extrope
