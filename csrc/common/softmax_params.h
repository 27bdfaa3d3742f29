// What attention takes beside q, k and v, in plain data: sinks, factors of the logits, and the
// limit of its heads.
#pragma once

#include <cstdint>

namespace extrope {

constexpr int64_t kMaxHeadDim = 512;  // of queries, keys and values

// Logits without a value, one for each query head.
struct Sinks {
  const float* data;  // nullptr: none
  int64_t stride;

  [[gnu::always_inline]] float of(int64_t head) const { return data[head * stride]; }
};

// Factors of the logits of each query.
struct QueryScale {
  const float* data;   // nullptr: none
  int64_t batch, seq;  // strides

  [[gnu::always_inline]] float of(int64_t sequence, int64_t token) const {
    return data[sequence * batch + token * seq];
  }
};

}  // namespace extrope
