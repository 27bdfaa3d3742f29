// The CPU kernels of decayed linear attention, one for each instruction set that scan_kernel.cpp
// is compiled for.
#pragma once

#include "cpu/linear_attention/params.h"

namespace extrope {

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
