// How a sweep sees a part of a sequence: its scratch memory and its chunks.
#pragma once

#include "gemm.h"
#include "permuteformer.h"
#include "workspace.h"

namespace extrope {
namespace {

constexpr float kFeatureEps = 1e-3f;  // FEATURE_EPS of sweep.py
constexpr int64_t kChunk = 96;
static_assert(kChunk % kTallRows == 0 && kChunk % kWide == 0);

struct Sizes {
  explicit Sizes(const SweepParams& p)
      : depth(p.score_dim + (p.extra ? 1 : 0)),
        rows(round_up(depth, kTallRows)),
        lanes(round_up(rows, kFloats)),
        wide(round_up(p.value_dim, kWide)),
        permuted(p.permute ? p.score_dim : 0) {}
  int64_t depth;     // of the products x y^T
  int64_t rows;      // of the state
  int64_t lanes;     // of a packed row of x and y
  int64_t wide;      // of a packed row of w and out, and of the state
  int64_t permuted;  // of a row of x and y that is permuted, else 0
};

struct Scratch {
  Scratch(const Sizes& n, float* begin) : space(begin) {
    x = space.take(kChunk * n.lanes);
    y = space.take(kChunk * n.lanes);
    y_columns = space.take(n.lanes * kChunk);
    w = space.take(kChunk * n.wide);
    out = space.take(kChunk * n.wide);
    scores = space.take(kChunk * kChunk);
    den = space.take(kChunk);
    falling = space.take(2 * kChunk);
    rising = space.take(kChunk + 1);
    step = space.take(n.permuted);
    permuted = space.take(n.permuted);
    powers = space.take(kChunk * n.permuted);
  }
  Workspace space;
  float *x, *y;      // (kChunk, lanes)
  float* y_columns;  // (lanes, kChunk)
  float *w, *out;    // (kChunk, wide)
  float* scores;     // (kChunk, kChunk)
  float* den;
  float* falling;  // [kChunk - 1 - d] = decay^d; 0 from kChunk on: later tokens are not seen
  float* rising;   // [d] = decay^d
  // Lanes, in words as large as an element of x.
  void* step;      // (score_dim,): of the permutation
  void* powers;    // (kChunk, score_dim): of its power at each token
  void* permuted;  // (score_dim,): a row of x or y
};

// The first of the heads that share this part's state.
inline int64_t first_head(const SweepParams& p, const SweepPart& part, int64_t heads) {
  return part.head * heads / p.heads;
}

inline int64_t heads_of_state(const SweepParams& p, int64_t heads) {
  return greater(heads / p.heads, 1);
}

struct Part {
  Part(const SweepParams& p, const SweepPart& part, float* workspace, float* state)
      : p(p), part(part), n(p), s(n, workspace), state(state), sum(state + n.rows * n.wide) {
    double power = 1.0;
    const double decay = p.decay ? p.decay[part.head] : 1.0;
    for (int64_t d = 0; d <= kChunk; ++d, power *= decay) {
      s.rising[d] = static_cast<float>(power);
      if (d < kChunk) s.falling[kChunk - 1 - d] = s.rising[d];
    }
    std::memset(s.falling + kChunk, 0, kChunk * sizeof(float));
  }
  int64_t token(int64_t i) const { return part.token + (p.reverse ? part.length - 1 - i : i); }
  int64_t offset(const SweepTensor& x, int64_t head, int64_t i) const {
    return part.batch * x.batch + token(i) * x.seq + head * x.head;
  }
  float* number(const RowNumbers& n, int64_t head, int64_t i) const {
    const int64_t h = first_head(p, part, n.heads) + head;
    return n.data + (part.batch * n.heads + h) * p.seqlen + token(i);
  }
  const SweepParams& p;
  const SweepPart& part;
  Sizes n;
  Scratch s;
  float* state;  // (rows, wide)
  float* sum;    // (lanes,): of y
};

// Some tokens of a part.
struct Chunk {
  Chunk(const Part& part, int64_t first)
      : first(first),
        count(smaller(kChunk, part.part.first + part.part.count - first)),
        rows(round_up(count, kTallRows)),
        lanes(round_up(count, kWide)) {}
  int64_t first, count;
  int64_t rows, lanes;  // padded with zeros
};

}  // namespace
}  // namespace extrope
