// The CPU kernels of the attention over regions, one per instruction set of forward_kernel.cpp and
// backward_kernel.cpp, or in bf16 of those with bf16 in their names.
#pragma once

#include <atomic>
#include <cstdint>

#include "cpu/attention/params.h"

namespace extrope {

// The sizes into which a kernel's work is cut, and the scratch memory of one tile.
struct TilePlan {
  int64_t tokens;     // per tile of queries
  int64_t block_n;    // keys per block
  int64_t workspace;  // floats, at an address aligned to 64 bytes
};

// The tiles of one sequence and one head of k add to the same rows of dk and dv. They add in the
// order of their rows, so that every run gives the same bits: each tile publishes the key up to
// which it is finished, and the next tile stays behind.
using KeysDone = std::atomic<int64_t>;
constexpr int64_t kAllKeys = INT64_MAX;

// Returns once `previous` is finished with all keys before `key`; nullptr: no earlier tile.
void wait_for_keys(const KeysDone* previous, int64_t key);

using PlanTiles = TilePlan (*)(const AttentionParams&);
using ForwardTile = void (*)(const AttentionParams&, const QueryTile&, const TilePlan&,
                             float* workspace);
using BackwardTile = void (*)(const AttentionParams&, const QueryTile&, const TilePlan&,
                              float* workspace, KeysDone* previous, KeysDone* done);

#define EXTROPE_DECLARE(isa)                                                                    \
  TilePlan attention_plan_##isa(const AttentionParams&);                                        \
  void attention_tile_##isa(const AttentionParams&, const QueryTile&, const TilePlan&,          \
                            float* workspace);                                                  \
  TilePlan attention_backward_plan_##isa(const AttentionParams&);                               \
  void attention_backward_tile_##isa(const AttentionParams&, const QueryTile&, const TilePlan&, \
                                     float* workspace, KeysDone* previous, KeysDone* done);

EXTROPE_DECLARE(baseline)
EXTROPE_DECLARE(avx2)
EXTROPE_DECLARE(avx512)
EXTROPE_DECLARE(neon)
EXTROPE_DECLARE(avx512_bf16)
EXTROPE_DECLARE(amx)

#undef EXTROPE_DECLARE

}  // namespace extrope
