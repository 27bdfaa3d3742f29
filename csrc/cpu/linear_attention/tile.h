// How a sweep sees a part of a sequence: its scratch memory and its chunks.
#pragma once

#include "cpu/linear_attention/ahead.h"
#include "cpu/simd/gemm.h"

namespace extrope {
namespace {

constexpr float kFeatureEps = 1e-3f;  // FEATURE_EPS of sweep.py
#if defined(__AMX_BF16__)
constexpr int64_t kChunk = 96;
#elif defined(__AVX512BF16__)
constexpr int64_t kChunk = 64;
#else
constexpr int64_t kChunk = 48;
#endif
static_assert(kChunk % kTallRows == 0 && kChunk % kFloats == 0);
constexpr int64_t kFewRows = 4;  // of a state, where a block of kTallRows would be padding mostly

constexpr int64_t kPastCaches = int64_t{16} << 20;  // bytes

// Whether rows of out, of elements of `size` bytes, should leave past the caches: they are too many
// for one to keep, and are whole lines, so that none has to be read before it is written.
inline bool leaves_past_caches(const SweepParams& p, int64_t size) {
  const int64_t heads = greater(p.x.heads, p.heads), row = p.value_dim * size;
  return row % kLine == 0 && p.batch * p.seqlen * heads * row >= kPastCaches;
}

// Rows at steps of 256 bytes would share a few sets of the cache.
inline int64_t step_of(int64_t floats) { return floats % 64 == 0 ? floats + kFloats : floats; }

struct Sizes {
  explicit Sizes(const SweepParams& p)
      : depth(p.score_dim + (p.extra ? 1 : 0)),
        tall_rows(depth / kTallRows * kTallRows),
        rows(tall_rows + round_up(depth - tall_rows, kFewRows)),
        lanes(round_up(rows, kFloats)),
        wide(round_up(p.value_dim, kWide)),
        lane_step(step_of(lanes)),
        row_step(step_of(wide)),
        permuted(p.permute ? p.score_dim : 0) {}
  static int64_t column(int64_t f) { return f; }  // where one of a state lies
  int64_t depth;                                  // of the products x y^T
  int64_t tall_rows;                              // of the state, in blocks of kTallRows
  int64_t rows;                                   // of the state
  int64_t lanes;                                  // of a packed row of x and y
  int64_t wide;                                   // of a packed row of w and out, and of the state
  int64_t lane_step, row_step;                    // from row to row of those
  int64_t permuted;                               // of a row of x and y that is permuted, else 0
};

// What every kernel keeps about a chunk.
struct ChunkScratch {
  ChunkScratch(int64_t permuted, float* begin) : space(begin) {
    den = space.take(kChunk);
    falling = space.take(2 * kChunk);
    rising = space.take(kChunk + kDoubles);
    step = space.take(permuted);
    this->permuted = space.take(permuted);
    powers = space.take(kChunk * permuted);
  }
  Workspace space;
  float* den;
  float* falling;  // [kChunk - 1 - d] = decay^d; 0 from kChunk on: later tokens are not seen
  float* rising;   // [d] = decay^d
  // Lanes, in words as large as an element of x.
  void* step;      // (score_dim,): of the permutation
  void* powers;    // (kChunk, score_dim): of its power at each token
  void* permuted;  // (score_dim,): a row of x or y
};

struct Scratch : ChunkScratch {
  Scratch(const Sizes& n, float* begin) : ChunkScratch(n.permuted, begin) {
    x = space.take(kChunk * n.lane_step);
    y = space.take(kChunk * n.lane_step);
    y_columns = space.take(n.lanes * kChunk);
    w = space.take(kChunk * n.row_step);
    out = space.take(kChunk * n.row_step);
    scores = space.take(kChunk * kChunk);
  }
  float *x, *y;      // (kChunk, lane_step)
  float* y_columns;  // (lanes, kChunk)
  float *w, *out;    // (kChunk, row_step)
  float* scores;     // (kChunk, kChunk)
};

template <typename T>
struct Walk {
  T* operator[](int64_t i) const { return begin + i * step; }
  T* begin;
  int64_t step;
};

template <typename Sizes, typename Scratch>
struct PartOf {
  PartOf(const SweepParams& p, const SweepPart& part, Ahead& ahead, float* workspace, float* state)
      : p(p),
        part(part),
        n(p),
        s(n, workspace),
        state(state),
        sum(state + n.rows * n.row_step),
        ahead(ahead) {
    const double decay = p.decay ? p.decay[part.head] : 1.0;
    doubles power{1.0};
    for (int i = 1; i < kDoubles; ++i) power[i] = power[i - 1] * decay;
    const double step = power[kDoubles - 1] * decay;
    for (int64_t d = 0; d <= kChunk; d += kDoubles, power *= step) {
      store(s.rising + d, __builtin_convertvector(power, few_floats));
    }
    for (int64_t d = 0; d < kChunk; ++d) s.falling[kChunk - 1 - d] = s.rising[d];
    std::memset(s.falling + kChunk, 0, kChunk * sizeof(float));
  }
  int64_t token(int64_t i) const { return token_of(p, part, i); }
  int64_t offset(const SweepTensor& x, int64_t head, int64_t i) const {
    return part.batch * x.batch + token(i) * x.seq + head * x.head;
  }
  // Rows of x from the token i on.
  template <typename T>
  Walk<T> walk(const SweepTensor& x, int64_t head, int64_t i) const {
    return {static_cast<T*>(x.data) + offset(x, first_head(p, part, x.heads) + head, i),
            p.reverse ? -x.seq : x.seq};
  }
  float* number(const RowNumbers& n, int64_t head, int64_t i) const {
    const int64_t h = first_head(p, part, n.heads) + head;
    return n.data + (part.batch * n.heads + h) * p.seqlen + token(i);
  }
  const SweepParams& p;
  const SweepPart& part;
  Sizes n;
  Scratch s;
  float* state;  // (rows, row_step)
  float* sum;    // (lanes,): of y
  Ahead& ahead;
};

using Part = PartOf<Sizes, Scratch>;

// Some tokens of a part.
struct Chunk {
  explicit Chunk(const SweepPart& part)
      : first(part.first),
        count(part.count),
        rows(round_up(count, kTallRows)),
        lanes(round_up(count, kFloats)) {}
  int64_t first, count;
  int64_t rows, lanes;  // padded with zeros
};

// Between a state as the kernel keeps it and as the caller does.
template <typename Sizes, bool Load>
void convert_state(const SweepParams& p, const SweepPart& part, float* state) {
  const Sizes n(p);
  const int64_t at = part.sequence * p.heads + part.head;
  for (int64_t d = 0; d < p.score_dim; ++d) {
    const int64_t outside = (at * p.score_dim + d) * p.value_dim;
    for (int64_t f = 0; f < p.value_dim; ++f) {
      float& inside = state[d * n.row_step + Sizes::column(f)];
      if constexpr (Load) {
        inside = p.first_state[outside + f];
      } else {
        p.last_state[outside + f] = inside;
      }
    }
  }
  float* sum = state + n.rows * n.row_step;
  if constexpr (Load) {
    std::memcpy(sum, p.first_sum + at * p.score_dim, p.score_dim * sizeof(float));
  } else {
    std::memcpy(p.last_sum + at * p.score_dim, sum, p.score_dim * sizeof(float));
  }
}

}  // namespace
}  // namespace extrope
