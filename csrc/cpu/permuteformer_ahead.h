// Fetches what the next chunk will read and write while this one is at work: its rows are too short
// and too far apart for the processor to see where they lead.
#pragma once

#include "permuteformer.h"
#include "workspace.h"

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

class Ahead {
 public:
  // Of y and w alone where rows are not made.
  Ahead(const SweepParams& p, const SweepNext& next, bool rows) {
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
    add(p, next, first, p.out, p.value_dim, p.out_is_float ? 4 : size);
  }

  // Whole rows, as many as have come due by so many more lines.
  inline __attribute__((always_inline)) void fetch(int64_t lines) {
    if ((due_ += lines) > 0) fetch_rows();
  }

 private:
  static constexpr int64_t kLine = 64;
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

  void fetch_rows() {
    for (; left_ > 0 && due_ > 0; at_ = at_ + 1 == count_ ? 0 : at_ + 1) {
      Rows& rows = rows_[at_];
      for (int64_t i = 0; i < rows.bytes; i += kLine) __builtin_prefetch(rows.begin + i, 0, 2);
      due_ -= rows.bytes / kLine;
      rows.begin += rows.step;
      if (at_ + 1 == count_) --left_;
    }
  }

  Rows rows_[4];
  int count_ = 0, at_ = 0;
  int64_t due_ = 0, left_;
};

}  // namespace
}  // namespace extrope
