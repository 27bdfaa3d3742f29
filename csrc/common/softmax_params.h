// What makes a softmax of the products of q and k, in plain data.
#pragma once

#include <cstdint>

namespace extrope {

constexpr int64_t kMaxHeadDim = 512;  // of queries, keys and values

// Logits without a value, one per query head.
struct Sinks {
  const float* data;  // nullptr: none
  int64_t stride;

  [[gnu::always_inline]] float of(int64_t head) const { return data[head * stride]; }
};

// Factors of each query's logits.
struct QueryScale {
  const float* data;   // nullptr: none
  int64_t batch, seq;  // strides

  [[gnu::always_inline]] float of(int64_t sequence, int64_t token) const {
    return data[sequence * batch + token * seq];
  }
};

struct SoftmaxParams {
  double softmax_scale;
  float softcap;  // 0: none
  QueryScale query_scale;
  Sinks sinks;
};

}  // namespace extrope
