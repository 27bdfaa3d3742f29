// Rows of new tokens on their way into a cache of e4m3: one function for each instruction set that
// quantize_kernel.cpp is compiled for.
#pragma once

#include "cpu/append/cache.h"

namespace extrope {

// Divides rows by the scale of their head and rounds them.
struct QuantizeParams {
  DType dtype;
  Plane in;  // tokens are counted through its blocks, of `seqlen` each
  int64_t seqlen, heads, head_dim;
  const float* scale;
  uint8_t* out;
  int64_t out_head;
  const int64_t* out_rows;  // the element that each token starts at; -1: written nowhere
};

// The tokens begin..end-1.
#define EXTROPE_DECLARE(isa) \
  void quantize_rows_##isa(const QuantizeParams&, int64_t begin, int64_t end);

EXTROPE_DECLARE(baseline)
EXTROPE_DECLARE(avx2)
EXTROPE_DECLARE(avx512)
EXTROPE_DECLARE(neon)

#undef EXTROPE_DECLARE

}  // namespace extrope
