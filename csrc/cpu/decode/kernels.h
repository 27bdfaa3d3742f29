// Attention of a few query tokens over a key/value cache on the CPU, split-KV, and the append of
// new keys and values: one function for each instruction set that the kernels are compiled for.
#pragma once

#include "cpu/decode/params.h"

namespace extrope {

// append: tokens begin..end-1 of all that are new.
#define EXTROPE_DECLARE(isa)                                                  \
  void append_tokens_##isa(const AppendParams&, int64_t begin, int64_t end);  \
  void decode_splits_##isa(const DecodeParams&, const Split*, int64_t count); \
  void merge_splits_##isa(const DecodeParams&, const QueryBlock*, int64_t count);

EXTROPE_DECLARE(baseline)
EXTROPE_DECLARE(avx2)
EXTROPE_DECLARE(avx512)
EXTROPE_DECLARE(neon)

#undef EXTROPE_DECLARE

}  // namespace extrope
