// Rows of tokens that are copied as they are: on their way into a cache, beside others of the same
// tokens that are rotated.
#pragma once

#include <cstring>

#include "common/rope_params.h"

namespace extrope {

struct CopiedRows {
  RopeTensor x;
  int64_t head_dim, element;  // the element's bytes
};

namespace {

// All heads of a token; the next token's are asked for.
inline void copy_token(const CopiedRows& rows, int64_t batch, int64_t seq, int64_t index) {
  const RopeTensor& x = rows.x;
  const int64_t to = x.out_rows ? x.out_rows[index] : batch * x.out_batch + seq * x.out_seq;
  if (x.out_rows && to < 0) return;
  const int64_t from = batch * x.in_batch + seq * x.in_seq, next = x.in_seq * rows.element;
  const char* in = static_cast<const char*>(x.in) + from * rows.element;
  char* out = static_cast<char*>(x.out) + to * rows.element;
  const bool together = x.in_head == rows.head_dim && x.out_head == rows.head_dim;
  const int64_t pieces = together ? 1 : x.heads;
  const int64_t bytes = rows.head_dim * rows.element * (together ? x.heads : 1);
  for (int64_t n = 0; n < pieces; ++n) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(in + next + i);
    std::memcpy(out, in, bytes);
    in += x.in_head * rows.element, out += x.out_head * rows.element;
  }
}

}  // namespace
}  // namespace extrope
