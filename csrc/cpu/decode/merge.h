// Merges the results of a row's splits into its output.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/decode/params.h"
#include "cpu/decode/tile.h"
#include "cpu/runtime/buffer.h"

namespace extrope {
namespace {

// Adds up the splits of one row in order.
template <typename T>
void merge_row(const DecodeParams& p, const QueryBlock& queries, int64_t row, float* sums) {
  const int64_t dim = p.cache.head_dim_v, group = p.heads_q / p.cache.heads, width = dim + 2;
  const int64_t tokens = queries.last_token - queries.first_token, count = tokens * p.heads_q;
  const float* first = p.partial + (queries.partial + row) * width;
  const int64_t token = queries.first_token + row / group % tokens;
  const int64_t head = row / (tokens * group) * group + row % group;
  float row_max = kNone, row_sum = 0;
  for (int64_t n = 0; n < queries.num_splits; ++n) {
    row_max = std::max(row_max, first[n * count * width + dim]);
  }
  std::fill_n(sums, dim, 0.0f);
  for (int64_t n = 0; n < queries.num_splits; ++n) {
    const float* split = first + n * count * width;
    const float rescale = std::exp2(split[dim] - row_max);
    row_sum += rescale * split[dim + 1];
    for (int64_t d = 0; d < dim; ++d) sums[d] += rescale * split[d];
  }
  constexpr double kLn2 = 0.69314718055994531;
  float scale = row_sum == 0 ? 0.0f : 1.0f / row_sum;
  float& lse = p.lse[(queries.batch * p.heads_q + head) * p.seqlen_q + token];
  lse =
      row_sum == 0 ? -INFINITY : static_cast<float>((row_max + std::log2(double{row_sum})) * kLn2);
  if (p.sinks.data) join_sink(p.sinks.of(head), scale, lse);
  if (p.cache.is_e4m3()) scale *= p.cache.v_scale[head / group] * kUnitE4m3;
  T* out = static_cast<T*>(p.out) + ((queries.batch * p.seqlen_q + token) * p.heads_q + head) * dim;
  for (int64_t d = 0; d < dim; ++d) narrow(sums[d] * scale, out[d]);
}

template <typename T>
void merge_splits(const DecodeParams& p, const QueryBlock* queries, int64_t count) {
  Buffer<float> sums(p.cache.head_dim_v);
  for (int64_t n = 0; n < count; ++n) {
    const int64_t tokens = queries[n].last_token - queries[n].first_token;
    for (int64_t r = 0; r < tokens * p.heads_q; ++r) merge_row<T>(p, queries[n], r, sums.data());
  }
}

}  // namespace
}  // namespace extrope
