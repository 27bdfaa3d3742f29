// How a scan sees a chunk of a sequence: sizes, scratch memory, and where its rows lie.
#pragma once

#include "cpu/linear_attention/kernels.h"
#include "cpu/runtime/workspace.h"
#include "cpu/simd/gemm.h"

namespace extrope {
namespace {

constexpr float kFeatureEps = 1e-3f;  // FEATURE_EPS of scan.py
constexpr int64_t kChunk = 48;        // tokens
static_assert(kChunk % kTallRows == 0 && kChunk % kFloats == 0);
constexpr int64_t kFewRows = 4;  // of a state, where a block of kTallRows would be padding mostly

// Rows at strides of 256 bytes would share a few sets of the cache.
inline int64_t stride_of(int64_t floats) { return floats % 64 == 0 ? floats + kFloats : floats; }

// In floats, padded.
struct Sizes {
  explicit Sizes(const ScanParams& p)
      : depth(p.score_dim + (p.extra ? 1 : 0)),
        tall_rows(depth / kTallRows * kTallRows),
        state_rows(tall_rows + round_up(depth - tall_rows, kFewRows)),
        key_dim(round_up(state_rows, kFloats)),
        value_dim(round_up(p.value_dim, kWide)),
        key_stride(stride_of(key_dim)),
        value_stride(stride_of(value_dim)) {}
  int64_t depth;                     // of the products q k^T
  int64_t tall_rows;                 // of a state, in blocks of kTallRows
  int64_t state_rows;                // of a state
  int64_t key_dim;                   // of a packed row of q and k
  int64_t value_dim;                 // of a packed row of v and out, and of a state
  int64_t key_stride, value_stride;  // from row to row of those
};

struct Scratch {
  Scratch(const ScanParams& p, const Sizes& n, float* begin) : space(begin) {
    const int64_t permuted_dim = p.permute ? p.score_dim : 0;
    den = space.take(kChunk);
    masked_powers = space.take(2 * kChunk);
    powers = space.take(kChunk + kFloats);
    step = space.take(permuted_dim);
    permuted = space.take(permuted_dim);
    sources = space.take(kChunk * permuted_dim);
    q = space.take(kChunk * n.key_stride);
    k = space.take(kChunk * n.key_stride);
    k_columns = space.take(n.key_dim * kChunk);
    v = space.take(kChunk * n.value_stride);
    out = space.take(kChunk * n.value_stride);
    scores = space.take(kChunk * kChunk);
  }
  Workspace space;
  float* den;
  float* masked_powers;  // [kChunk - 1 - d] = decay^d; 0 from kChunk on: later tokens are not seen
  float* powers;         // [d] = decay^d
  // Numbers of dims, in words as large as an element of q.
  void* step;        // (score_dim,): of the permutation
  void* sources;     // (kChunk, score_dim): of its power at each token
  void* permuted;    // (score_dim,): a row of q or k
  float *q, *k;      // (kChunk, key_stride)
  float* k_columns;  // (key_dim, kChunk)
  float *v, *out;    // (kChunk, value_stride)
  float* scores;     // (kChunk, kChunk)
};

template <typename T>
struct Rows {
  T* operator[](int64_t i) const { return begin + i * stride; }
  T* begin;
  int64_t stride;
};

struct Chunk {
  Chunk(const ScanParams& p, const ScanPart& part, float* workspace, float* state)
      : p(p),
        part(part),
        n(p),
        s(p, n, workspace),
        state(state),
        key_sum(state + n.state_rows * n.value_stride),
        count(part.count),
        rows(round_up(count, kTallRows)),
        columns(round_up(count, kFloats)) {
    const double decay = p.decay ? p.decay[part.head] : 1.0;
    doubles power{1.0};
    for (int i = 1; i < kDoubles; ++i) power[i] = power[i - 1] * decay;
    const double step = power[kDoubles - 1] * decay;
    for (int64_t d = 0; d <= kChunk; d += kFloats) {
      const doubles next = power * step;
      store(s.powers + d, narrow(power, next));
      power = next * step;
    }
    for (int64_t d = 0; d < kChunk; ++d) s.masked_powers[kChunk - 1 - d] = s.powers[d];
    std::memset(s.masked_powers + kChunk, 0, kChunk * sizeof(float));
  }

  // How many of a tensor's heads share this state, and the first of them.
  int64_t group(int64_t heads) const { return greater(heads / p.heads, 1); }
  int64_t first_head(int64_t heads) const { return part.head * heads / p.heads; }
  int64_t token(int64_t i) const {
    i += part.first;
    return part.token + (p.reverse ? part.length - 1 - i : i);
  }
  // The chunk's rows of x, by `head` of those that share the state.
  template <typename T>
  Rows<T> rows_of(const ScanTensor& x, int64_t head) const {
    return {static_cast<T*>(x.data) + part.batch * x.batch + token(0) * x.seq +
                (first_head(x.heads) + head) * x.head,
            p.reverse ? -x.seq : x.seq};
  }
  float* number(const RowNumbers& x, int64_t head, int64_t i) const {
    const int64_t h = first_head(x.heads) + head;
    return x.data + (part.batch * x.heads + h) * p.seqlen + token(i);
  }

  const ScanParams& p;
  const ScanPart& part;
  Sizes n;
  Scratch s;
  float* state;    // (state_rows, value_stride)
  float* key_sum;  // (key_dim,)
  int64_t count;
  int64_t rows, columns;  // count, padded with zeros
};

}  // namespace
}  // namespace extrope
