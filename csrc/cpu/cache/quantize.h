// Quantizes rows of new tokens for a cache in e4m3: one function per instruction set of
// quantize_kernel.cpp.
#pragma once

#include "cpu/cache/cache.h"

namespace extrope {

// Arguments: rows are divided by their head's scale and rounded.
struct QuantizeParams {
  DType dtype;
  Plane in;  // tokens have one count through its blocks of `seqlen`
  int64_t seqlen, heads, head_dim;
  const float* scale;
  uint8_t* out;
  int64_t out_head;
  const int64_t* out_rows;  // each token's first element; -1: not written
};

// Quantizes the tokens begin..end-1.
#define EXTROPE_DECLARE(isa) \
  void quantize_rows_##isa(const QuantizeParams&, int64_t begin, int64_t end);

EXTROPE_DECLARE(baseline)
EXTROPE_DECLARE(avx2)
EXTROPE_DECLARE(avx512)
EXTROPE_DECLARE(neon)

#undef EXTROPE_DECLARE

}  // namespace extrope
