// The CPU kernels of decayed linear attention, one per instruction set of scan_kernel.cpp, and
// their arguments in plain data.
//
// The forward and every gradient consist of one operation, a chunkwise scan; its formula is in
// extrope_kernels/ops/permuteformer/cpu.py.
#pragma once

#include <cstdint>

#include "common/rope_params.h"

namespace extrope {

struct PermuteParams;
struct PermuteCycles;

// (batch, seqlen, heads, dim), the last dimension contiguous; strides in elements. Packed sequences
// have no batch: its stride is 0. Absent if data is nullptr.
struct ScanTensor {
  void* data;
  int64_t stride_batch, stride_seq, stride_head;
  int64_t heads;
};

// One number per row, float (batch, heads, seqlen), contiguous; nullptr: all 1.
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
  bool extra;       // a score includes q_extra * k_extra
  bool phi_scores;  // the feature map is applied to q and k; else to v
  bool causal, reverse;
  bool out_is_float;  // else out has q's dtype
  float* den;         // (batch, q.heads, seqlen): divide by it and write it; nullptr: do neither

  // Permutations, one per head of k, whose powers permute q and k; nullptr: none.
  const PermuteParams* permute;
  const PermuteCycles* cycles;

  const float* decay;         // (heads,), nullptr: 1
  const int32_t* cu_seqlens;  // (num_sequences + 1,), nullptr if not packed
  int64_t num_sequences;

  // States before the first token and after the last, (sequences, heads, score_dim, value_dim) and
  // (sequences, heads, score_dim). nullptr: a first state of zero, a last state that is not wanted.
  const float *first_state, *first_sum;
  float *last_state, *last_sum;
};

// Consecutive tokens of one sequence, in the order of their visits, for one state.
struct ScanPart {
  int64_t sequence, head;
  int64_t batch, token, length;  // of the sequence: batch entry, first token, number of tokens
  int64_t first, count;
};

// The sizes into which a kernel's work is cut, and its memory in floats, at addresses aligned to 64
// bytes.
struct ScanPlan {
  int64_t chunk;      // tokens; parts start at multiples of it
  int64_t state;      // per state
  int64_t workspace;  // per part
};

// Runs a chunk of a part. With `writes_out`, writes its rows of out, and adds the chunk's keys to
// the state if causal; without, only adds the keys.
using RunChunk = void (*)(const ScanParams&, const ScanPart&, bool writes_out, float* workspace,
                          float* state);
// Converts first_state to a state in the layout of the instruction set's kernels, or such a state
// to last_state.
using ConvertState = void (*)(const ScanParams&, const ScanPart&, bool load, float* state);
// out[row] = <q[row], k[row]> over the last dimension, in RowNumbers' form, for the tokens
// begin..end-1.
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
