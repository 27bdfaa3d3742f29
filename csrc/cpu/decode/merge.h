// From what the parts of a row found to its output.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/decode/kernels.h"
#include "cpu/decode/tile.h"
#include "cpu/runtime/scratch.h"

namespace extrope {
namespace {

// Adds the parts of one row up in their order.
template <typename T>
void merge_row(const DecodeParams& p, const DecodeRows& rows, int64_t row, float* sums) {
  const int64_t group = p.heads_q / p.heads_k, width = p.head_dim + 2;
  const int64_t tokens = rows.last_token - rows.first_token, count = tokens * p.heads_q;
  const float* first = p.partial + (rows.partial + row) * width;
  float largest = kNone, total = 0;
  for (int64_t n = 0; n < rows.parts; ++n) {
    largest = std::max(largest, first[n * count * width + p.head_dim]);
  }
  std::fill_n(sums, p.head_dim, 0.0f);
  for (int64_t n = 0; n < rows.parts; ++n) {
    const float* part = first + n * count * width;
    const float weight = std::exp2(part[p.head_dim] - largest);
    total += weight * part[p.head_dim + 1];
    for (int64_t d = 0; d < p.head_dim; ++d) sums[d] += weight * part[d];
  }
  const int64_t token = rows.first_token + row / group % tokens;
  const int64_t head = row / (tokens * group) * group + row % group;
  T* out =
      static_cast<T*>(p.out) + ((rows.batch * p.seqlen_q + token) * p.heads_q + head) * p.head_dim;
  const float inverse = total == 0 ? 0.0f : 1.0f / total;
  for (int64_t d = 0; d < p.head_dim; ++d) narrow(sums[d] * inverse, out[d]);
  constexpr double kLn2 = 0.69314718055994531;
  p.lse[(rows.batch * p.heads_q + head) * p.seqlen_q + token] =
      total == 0 ? -INFINITY : static_cast<float>((largest + std::log2(double{total})) * kLn2);
}

template <typename T>
void merge_parts(const DecodeParams& p, const DecodeRows* rows, int64_t count) {
  Buffer<float> sums(p.head_dim);
  for (int64_t n = 0; n < count; ++n) {
    const int64_t tokens = rows[n].last_token - rows[n].first_token;
    for (int64_t r = 0; r < tokens * p.heads_q; ++r) {
      merge_row<T>(p, rows[n], r, sums.data());
    }
  }
}

}  // namespace
}  // namespace extrope
