// The CUDA kernel of the fused step into a cache, free of torch and of CUDA headers.
#pragma once

#include "common/kv_cache.h"
#include "common/regions.h"
#include "common/rope_norm_params.h"

namespace extrope {

struct AppendParams {
  RopeParams rope;     // the tokens, and by what to rotate; no tensors
  RopeTensor q, k, v;  // q without heads: there is none. k and v go into the cache
  RopeNorm q_norm, k_norm;
  double norm_eps;
  bool rotates_q, rotates_k;
  bool maps;  // positions, by `map`: to where a score method stores keys
  PositionMap map;
  bool behind;  // positions are those behind the slots in use, less the left padding

  KVCache cache;
  int64_t blocks;     // of the cache
  const void* slots;  // of each token, instead of the lengths: -1 for nowhere; else nullptr
  bool slots_are_i64;
  int64_t slot_batch, slot_seq;
};

// Enqueues it on `stream` (a cudaStream_t) of the current device. Returns 0 or a cudaError_t.
int rope_append_launch(const AppendParams& params, void* stream);

}  // namespace extrope
