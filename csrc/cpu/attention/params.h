// What an attention kernel needs to know, in plain data.
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
  int64_t batch, seq, head;
  int64_t head_dim;
  const int64_t* rows = nullptr;  // the element that each token starts at, in place of `seq`
  bool is_e4m3 = false;           // keys or values of a cache, whatever AttentionParams::dtype

  [[gnu::always_inline]] int64_t at(int64_t token) const {
    return rows ? rows[token] : token * seq;
  }
};

// Absolute positions of the first token of each sequence.
struct Starts {
  const int32_t* data;     // nullptr: all 0
  int64_t stride, offset;  // offset is added to all

  [[gnu::always_inline]] int64_t of(int64_t sequence) const {
    return (data ? data[sequence * stride] : 0) + offset;
  }
};

// What rows are rotated by as they are read: the cosines and sines of each token's pairs.
struct CosSin {
  const float *cos, *sin;    // nullptr: rows are used as they come
  int64_t batch, seq, head;  // strides; that of heads of k is 0 where all of them rotate alike
};

struct AttentionParams {
  DType dtype;
  int64_t batch, seqlen_q, seqlen_k;   // packed: batch 1, both seqlens the number of tokens
  int64_t heads_q, heads_k, head_dim;  // head_dim of q and k

  Regions regions;
  Starts q_start, k_start;
  float softmax_scale;
  QueryScale row_scale;
  float softcap;  // 0: none
  Sinks sinks;
  const int32_t* cu_seqlens;  // (num_sequences + 1,) token boundaries, nullptr when not packed
  int64_t num_sequences;

  AttentionTensor q, v, out;
  bool float32_out;                // out is float whatever dtype is; elsewhere it is of dtype
  AttentionTensor k[kMaxRegions];  // raw where k_cos_sin rotates it
  CosSin q_cos_sin[kMaxRegions], k_cos_sin[kMaxRegions];
  int64_t half;  // pairs of dims that rotate
  bool interleaved;
  const float *k_scale, *v_scale;  // of each head of k, or nullptr
  float* lse;                      // (batch, heads_q, seqlen_q)
  int64_t lse_head;                // its stride of heads; one batch follows another

  // Backward alone. dlse is shaped like lse, or nullptr; dq, dk and dv are float.
  AttentionTensor dout, dq, dk, dv;
  const float* dlse;
};

// Consecutive tokens of one sequence, for the q heads that share one head of k.
struct QueryTile {
  int64_t batch, head;         // head of k
  int64_t first_q, first_k;    // the sequence's first token
  int64_t seqlen_q, seqlen_k;  // of the sequence
  int64_t q_start, k_start;    // positions of its first tokens
  int64_t token, tokens;       // within the sequence
};

}  // namespace extrope
