// Attention of a few query tokens over a key/value cache on the CPU, split-KV: one function per
// instruction set.
#pragma once

#include "cpu/decode/params.h"

namespace extrope {

#define EXTROPE_DECLARE(isa)                                                  \
  void decode_splits_##isa(const DecodeParams&, const Split*, int64_t count); \
  void merge_splits_##isa(const DecodeParams&, const QueryBlock*, int64_t count);

EXTROPE_DECLARE(baseline)
EXTROPE_DECLARE(avx2)
EXTROPE_DECLARE(avx512)
EXTROPE_DECLARE(neon)

#undef EXTROPE_DECLARE

}  // namespace extrope
