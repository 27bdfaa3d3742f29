// Fetches what the next chunk will read and write while this one is at work: its rows are too short
// and too far apart for the processor to see where they lead.
#pragma once

#include "cpu/linear_attention/kernels.h"
#include "cpu/runtime/workspace.h"

namespace extrope {
namespace {

// The first of the heads that share this part's state.
inline int64_t first_head(const SweepParams& p, const SweepPart& part, int64_t heads) {
  return part.head * heads / p.heads;
}

inline int64_t heads_of_state(const SweepParams& p, int64_t heads) {
  return greater(heads / p.heads, 1);
}

inline int64_t token_of(const SweepParams& p, const SweepPart& part, int64_t i) {
  return part.token + (p.reverse ? part.length - 1 - i : i);
}

constexpr int64_t kLine = 64;  // bytes
// How close to the core what is fetched comes: to its second cache, where floats wait for their
// turn without driving what is at work out of the first. Rows of bf16 are half as long; with them,
// a processor with AVX512_BF16 was a fifth faster by a fetch to the first.
#if defined(__AVX512BF16__)
constexpr int kLocality = 3;
#else
constexpr int kLocality = 2;
#endif

class Ahead {
 public:
  // x where rows are made, and out where they are written through the caches.
  Ahead(const SweepParams& p, const SweepNext& next, bool rows, bool out) {
    const int64_t first = next.part.count * next.share / next.states;
    left_ = next.part.count * (next.share + 1) / next.states - first;
    if (left_ <= 0) return;
    const int64_t size = p.dtype == DType::f32 ? 4 : 2;
    if (p.causal || !rows) {
      add(p, next, first, p.y, p.score_dim, size);
      add(p, next, first, p.w, p.value_dim, size);
    }
    if (!rows) return;
    add(p, next, first, p.x, p.score_dim, size);
    if (out) add(p, next, first, p.out, p.value_dim, p.out_is_float ? 4 : size);
  }

  // Cuts all there is into so many shares, for fetch().
  void deal(int64_t shares) {
    int64_t lines = 0;
    for (int i = 0; i < count_; ++i) lines += (rows_[i].bytes + kLine - 1) / kLine;
    share_ = lines * greater(left_, 0) / greater(shares, 1) + 1;
  }

  void fetch() { fetch(share_); }

  // So many more lines: few at a time, or what is asked for meanwhile waits behind them.
  void fetch(int64_t lines) {
    for (int64_t left = lines * kLine; left_ > 0 && left > 0;) {
      Rows& rows = rows_[at_];
      const int64_t end = smaller(fetched_ + left, rows.bytes);
      for (int64_t i = fetched_; i < end; i += kLine)
        __builtin_prefetch(rows.begin + i, 0, kLocality);
      left -= end - fetched_;
      fetched_ = end;
      if (end == rows.bytes) next_row();
    }
  }

 private:
  struct Rows {
    const char* begin;  // of the next row: all heads of the states side by side
    int64_t step, bytes;
  };

  void add(const SweepParams& p, const SweepNext& next, int64_t first, const SweepTensor& x,
           int64_t dim, int64_t size) {
    const SweepPart& part = next.part;
    const int64_t heads = x.head == dim ? greater(next.states * x.heads / p.heads, 1) : 1;
    const int64_t at = part.batch * x.batch + token_of(p, part, part.first + first) * x.seq +
                       first_head(p, part, x.heads) * x.head;
    rows_[count_++] = {static_cast<const char*>(x.data) + at * size,
                       (p.reverse ? -x.seq : x.seq) * size, heads * dim * size};
  }

  void next_row() {
    rows_[at_].begin += rows_[at_].step;
    fetched_ = 0;
    if (++at_ == count_) at_ = 0, --left_;
  }

  Rows rows_[4];
  int count_ = 0, at_ = 0;
  int64_t share_ = 0;           // lines
  int64_t left_, fetched_ = 0;  // tokens of all tensors, and bytes of the row at work
};

}  // namespace
}  // namespace extrope
