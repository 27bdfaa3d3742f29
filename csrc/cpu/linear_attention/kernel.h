// The CPU kernels of decayed linear attention, one for each instruction set that scan_kernel.cpp is
// compiled for, and what they need to know, in plain data.
//
// A chunkwise scan is the one operation that the forward and every gradient are made of; its
// formula is in extrope_kernels/ops/permuteformer/cpu.py.
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

// How a kernel wants its work cut, and the memory it needs: floats, at addresses aligned to 64
// bytes.
struct ScanPlan {
  int64_t chunk;      // tokens; parts start at its multiples
  int64_t state;      // of a state
  int64_t workspace;  // of a part
};

// A chunk of a part: with `rows` writes them, and adds the chunk's keys to the state if causal;
// without adds the keys alone.
using RunChunk = void (*)(const ScanParams&, const ScanPart&, bool rows, float* workspace,
                          float* state);
// From first_state to a state, which is laid out as the kernels of one instruction set like it, or
// from it to last_state.
using ConvertState = void (*)(const ScanParams&, const ScanPart&, bool load, float* state);
// out[row] = <q[row], k[row]> over the last dimension, as RowNumbers, for tokens begin to end.
using DotRows = void (*)(const ScanParams&, int64_t begin, int64_t end, float* out);

struct ScanKernels {
  ScanPlan (*plan)(const ScanParams&);
  RunChunk chunk;
  ConvertState convert;
  DotRows dots;
};

#define EXTROPE_DECLARE(isa)                                                       \
  ScanPlan scan_plan_##isa(const ScanParams&);                                     \
  void scan_chunk_##isa(const ScanParams&, const ScanPart&, bool, float*, float*); \
  void scan_convert_##isa(const ScanParams&, const ScanPart&, bool, float*);       \
  void scan_dots_##isa(const ScanParams&, int64_t, int64_t, float*);

EXTROPE_DECLARE(baseline)
EXTROPE_DECLARE(avx2)
EXTROPE_DECLARE(avx512)
EXTROPE_DECLARE(neon)
#undef EXTROPE_DECLARE

}  // namespace extrope
