// The CPU kernels of decayed linear attention, one for each instruction set that
// permuteformer_kernel.cpp is compiled for.
#pragma once

#include "cpu/linear_attention/params.h"

namespace extrope {

// How a kernel wants its work cut, and the memory it needs: floats, at addresses aligned to 64
// bytes.
struct SweepPlan {
  int64_t chunk;      // tokens; parts start at its multiples
  int64_t state;      // of a state
  int64_t workspace;  // of a part
};

// A state is laid out as the kernels of one instruction set like it.
using PlanSweep = SweepPlan (*)(const SweepParams&);
// The chunk that a thread visits next, of `states` neighbours: fetched by the calls for this one, a
// share of its tokens by each.
struct SweepNext {
  SweepPart part;  // the first state's; without tokens where there is none
  int64_t states, share;
};

// For a part of one chunk at most.
using RunPart = void (*)(const SweepParams&, const SweepPart&, const SweepNext&, float* workspace,
                         float* state);
using ConvertState = void (*)(const SweepParams&, const SweepPart&, float* state);
// out[row] = <a[row], b[row]> over the last dimension, as RowNumbers, for rows begin to end.
using DotRows = void (*)(const SweepParams&, int64_t begin, int64_t end, float* out);

// States begin to end, of all sequences and heads, where is_step says so.
using StepStates = void (*)(const SweepParams&, int64_t begin, int64_t end);

struct SweepKernels {
  PlanSweep plan;
  RunPart gather;           // adds the part's keys to the state
  RunPart sweep;            // writes the part's rows; adds its keys to the state if causal
  ConvertState load, save;  // first_state to state, state to last_state
  DotRows dots;             // of x and y
};

#define EXTROPE_DECLARE_SWEEPS(isa)                                                                \
  SweepPlan sweep_plan_##isa(const SweepParams&);                                                  \
  void sweep_gather_##isa(const SweepParams&, const SweepPart&, const SweepNext&, float*, float*); \
  void sweep_part_##isa(const SweepParams&, const SweepPart&, const SweepNext&, float*, float*);   \
  void sweep_load_##isa(const SweepParams&, const SweepPart&, float*);                             \
  void sweep_save_##isa(const SweepParams&, const SweepPart&, float*);
#define EXTROPE_DECLARE(isa)                                           \
  EXTROPE_DECLARE_SWEEPS(isa)                                          \
  void sweep_dots_##isa(const SweepParams&, int64_t, int64_t, float*); \
  void sweep_step_##isa(const SweepParams&, int64_t, int64_t);

EXTROPE_DECLARE(baseline)
EXTROPE_DECLARE(avx2)
EXTROPE_DECLARE(avx512)

EXTROPE_DECLARE_SWEEPS(avx512_bf16)
EXTROPE_DECLARE_SWEEPS(amx)

#undef EXTROPE_DECLARE
#undef EXTROPE_DECLARE_SWEEPS

constexpr int64_t kStepTokens = 8, kStepDim = 256;

// Whether it is a forward from state to state that is too short for chunks.
inline bool is_step(const SweepParams& p) {
  return p.last_state && p.seqlen > 0 && p.seqlen <= kStepTokens && p.score_dim <= kStepDim &&
         p.value_dim <= kStepDim && !p.cu_seqlens && p.phi_scores && p.causal && !p.reverse &&
         !p.extra && !p.permute && !p.gate.data && !p.x_scale.data && !p.y_scale.data &&
         p.y.heads <= p.heads;
}

// Of a step, fewer would not make up for turning its state into tiles and back.
constexpr int64_t kTileTokens = 64;

// Whether there is a form for products of bf16: for the forward.
inline bool can_use_tiles(const SweepParams& p) {
  return p.dtype == DType::bf16 && p.phi_scores && !p.extra && !p.gate.data && !p.x_scale.data &&
         !p.y_scale.data && p.y.heads <= p.heads && !(p.last_state && p.seqlen < kTileTokens);
}

}  // namespace extrope
