// The share that each set of keys has in the joint softmax, and its log-sum-exp.
#pragma once

#include "cpu/merge/kernel.h"
#include "cpu/simd/exp2.h"

namespace extrope {
namespace {

constexpr int64_t kTokens = 16;  // of a block; whole vectors of every instruction set
constexpr int kNoKeys = -1;      // in place of a share

template <typename Wide>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = floats;
};
template <>
struct VectorOf<double> {
  using type = doubles;
};

inline floats exp_of(floats x) { return exp2_vector(x * 0x1.715476p+0f); }
inline doubles exp_of(doubles x) {
  for (int i = 0; i < kDoubles; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}
inline float log_of(float x) { return __builtin_logf(x); }
inline double log_of(double x) { return __builtin_log(x); }

// Log-sum-exps of a block in the place of its shares, set after set; what is no token has no keys.
template <typename Lse, typename Wide>
void read_lses(const MergeParams& p, int64_t first, int64_t head, int64_t count, Wide* lses) {
  const int64_t batch = first / p.seqlen, seq = first % p.seqlen;
  for (int64_t n = 0; n < p.num_sets; ++n) {
    const MergeRows& set = p.sets[n];
    const Lse* from = static_cast<const Lse*>(set.lse) + batch * set.lse_batch +
                      head * set.lse_head + seq * set.lse_seq;
    for (int64_t t = 0; t < count; ++t) lses[n * kTokens + t] = from[t * set.lse_seq];
    for (int64_t t = count; t < kTokens; ++t) lses[n * kTokens + t] = -__builtin_inf();
  }
}

// From log-sum-exps to shares, in place; `joint` gets the log-sum-exps over all sets.
template <typename Wide>
void find_shares(Wide* shares, int64_t num_sets, Wide* joint) {
  using V = typename VectorOf<Wide>::type;
  const V none = V{} - static_cast<Wide>(__builtin_inf());
  for (int64_t t = 0; t < kTokens; t += Lanes<V>::count) {
    const auto at = [&](int64_t n) { return shares + n * kTokens + t; };
    V row_max = none, row_sum = V{};
    for (int64_t n = 0; n < num_sets; ++n) {
      const V lse = load<V>(at(n));
      row_max = (lse > row_max) | (lse != lse) ? lse : row_max;
    }
    const V origin = row_max == none ? V{} : row_max;
    for (int64_t n = 0; n < num_sets; ++n) {
      const V lse = load<V>(at(n)), weight = exp_of(plain(lse - origin));
      row_sum += weight;
      store(at(n), lse == none ? V{} + kNoKeys : weight);
    }
    for (int64_t n = 0; n < num_sets; ++n) {
      const V weight = load<V>(at(n));
      store(at(n), weight < 0 ? weight : weight / row_sum);
    }
    for (int i = 0; i < Lanes<V>::count; ++i) {
      const bool infinite = __builtin_isinf(row_max[i]);
      joint[t + i] = infinite ? row_max[i] : row_max[i] + log_of(row_sum[i]);
    }
  }
}

template <typename Lse, typename Wide>
void write_lses(const MergeParams& p, int64_t first, int64_t head, int64_t count,
                const Wide* joint) {
  Lse* to = static_cast<Lse*>(p.merged.lse) + first / p.seqlen * p.merged.lse_batch +
            head * p.merged.lse_head + first % p.seqlen * p.merged.lse_seq;
  for (int64_t t = 0; t < count; ++t) to[t * p.merged.lse_seq] = static_cast<Lse>(joint[t]);
}

}  // namespace
}  // namespace extrope
