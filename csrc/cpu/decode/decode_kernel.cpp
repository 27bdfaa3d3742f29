// Attention over a key/value cache on the CPU. Compiled once for each instruction set, with
// EXTROPE_ISA as its name.
//
// Cached keys are rotated to their stored position s(j). Far of a query they are used as they lie;
// near of it they must turn on by u(j) = j - s(j). A tile of near keys from j0 on turns by
// u(j) - u(j0) alone, which one small table serves for all tiles, and the queries by I - u(j0): no
// angle of a key is ever large.

#include <algorithm>
#include <cmath>

#include "cpu/decode/frames.h"
#include "cpu/decode/kernels.h"
#include "cpu/decode/merge.h"
#include "cpu/decode/tile.h"
#include "cpu/runtime/scratch.h"
#include "cpu/simd/rotate_row.h"
#include "cpu/simd/sincos.h"

namespace extrope {
namespace {

constexpr int kMaxRows = 4;  // of one pass over a tile

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// The work on some rows and some keys: scratch memory of a thread.
template <typename T>
class Worker {
 public:
  explicit Worker(const DecodeParams& p)
      : p_(p),
        turn_{p.head_dim, p.half, p.interleaved},
        frames_(p),
        group_(p.heads_q / p.heads_k),
        stride_(round_up(p.head_dim, kFloats)),
        table_stride_(round_up(p.half, kFloats)),
        cos_(table_stride_),
        sin_(table_stride_) {}

  void run(const DecodePart& part) {
    rows_ = part.rows;
    tokens_ = rows_->last_token - rows_->first_token;
    count_ = tokens_ * group_;
    at_once_ = count_ <= 2 ? count_ : kMaxRows;
    padded_ = round_up(count_, at_once_);
    freq_ = p_.inv_freq + rows_->batch * p_.freq_batch;
    const int64_t begin = part.index * rows_->split;
    const int64_t first = position(0), last = position(tokens_ - 1);
    const int64_t end = std::min(begin + rows_->split, last + 1);
    prepare(first);
    // Far of all rows, far of some, near of all, past the first rows' own tokens.
    const int64_t far = std::min(frames_.near_from(first), first + 1);
    const int64_t near = std::min(frames_.near_from(last), last + 1);
    segment(begin, std::min(end, far), kFar, false);
    segment(std::max(begin, far), std::min(end, near), frames_.plain ? kFar : kBoth, true);
    segment(std::max(begin, near), std::min(end, first + 1), kNear, false);
    segment(std::max({begin, near, first + 1}), end, kNear, true);
    finish(part);
  }

 private:
  enum Kind { kFar, kNear, kBoth };

  int64_t position(int64_t token) const {
    return rows_->length - p_.seqlen_q + rows_->first_token + token;
  }

  void prepare(int64_t first) {
    const int64_t all = p_.heads_k * padded_;
    for (Buffer<float>* x : {&raw_, &far_, &near_, &sums_}) x->assign(all * stride_, 0.0f);
    scores_.resize(kKeys * kMaxRows);
    other_.resize(kKeys * kMaxRows);
    running_.assign(all / at_once_, {floats{} + kNone, floats{}});
    for (int64_t token = 0; token < tokens_; ++token) {
      const int64_t i = first + token;
      double scale = p_.scale;
      if (p_.log_n > 0 && i > 0) scale *= std::max(1.0, std::log(i + 1.0) / std::log(p_.log_n));
      for (int64_t head = 0; head < p_.heads_q; ++head) {
        const T* q = static_cast<const T*>(p_.q) + rows_->batch * p_.q_batch +
                     (rows_->first_token + token) * p_.q_seq + head * p_.q_head;
        float* raw = &raw_[query(token, head)];
        for (int64_t d = 0; d < p_.head_dim; ++d) raw[d] = widen(q[d]) * static_cast<float>(scale);
      }
    }
    turn_queries(far_, [&](int64_t token) { return frames_.far_query(position(token)); });
  }

  // Where a query's row starts in raw_, far_, near_ and sums_.
  int64_t query(int64_t token, int64_t head) const {
    return (head / group_ * padded_ + token * group_ + head % group_) * stride_;
  }

  template <typename Position>
  void turn_queries(Buffer<float>& out, Position at) {
    for (int64_t token = 0; token < tokens_; ++token) {
      const Angles angles{at(token), p_.amplitude, 0.0, nullptr, false};
      fill_sincos(freq_, p_.half, angles, cos_.data(), sin_.data());
      for (int64_t head = 0; head < p_.heads_q; ++head) {
        const int64_t row = query(token, head);
        turn_row(turn_, &raw_[row], cos_.data(), sin_.data(), 1.0f, &out[row]);
      }
    }
  }

  void prepare_table() {
    if (table_freq_ == freq_) return;
    table_freq_ = freq_;
    table_cos_.resize(kKeys * table_stride_);
    table_sin_.resize(kKeys * table_stride_);
    keys_.assign(kKeys * stride_, 0.0f);
    for (int64_t n = 0; n < kKeys; ++n) {
      const Angles angles{static_cast<double>(n) * frames_.table_step(), 1.0, 0.0, nullptr, false};
      fill_sincos(freq_, p_.half, angles, &table_cos_[n * table_stride_],
                  &table_sin_[n * table_stride_]);
    }
  }

  // Where the keys or values from..end-1 lie; the last one again to the end of the tile.
  void point(const CachePlane& plane, int64_t from, int64_t end, const T** rows) const {
    const int64_t count = std::min<int64_t>(kKeys, end - from);
    const T* base = static_cast<const T*>(plane.data);
    int64_t slot = rows_->slot + from, in_page = slot, size = slot + count;
    const int32_t* page = nullptr;
    if (p_.block_table) {
      size = p_.page_size;
      page = p_.block_table + rows_->batch * p_.table_batch + slot / size;
      in_page = slot % size;
    }
    int64_t block = page ? *page : rows_->batch;
    for (int64_t n = 0; n < count; ++n, ++in_page) {
      if (in_page == size) block = *++page, in_page = 0;
      rows[n] = base + block * plane.block + in_page * plane.slot;
    }
    std::fill(rows + count, rows + kKeys, rows[count - 1]);
  }

  void segment(int64_t begin, int64_t end, Kind kind, bool masked) {
    if (begin >= end) return;
    if (kind != kFar) prepare_table();
    point(p_.k, begin, end, next_rows_);
    for (int64_t j = begin; j < end; j += kKeys) {
      const int64_t count = std::min<int64_t>(kKeys, end - j);
      std::copy_n(next_rows_, kKeys, key_rows_);
      point(p_.v, j, end, value_rows_);
      if (j + kKeys < end) point(p_.k, j + kKeys, end, next_rows_);
      if (kind != kFar) {
        const double origin = frames_.key_turn(j);
        turn_queries(near_, [&](int64_t token) { return position(token) - origin; });
      }
      // All heads of a tile in turn: in the usual layout they are neighbours in memory.
      for (head_ = 0; head_ < p_.heads_k; ++head_) {
        if (kind != kFar) turn_keys(j, count);
        switch (at_once_) {
          case 1:
            tile<1>(j, count, kind, masked);
            break;
          case 2:
            tile<2>(j, count, kind, masked);
            break;
          default:
            tile<4>(j, count, kind, masked);
        }
      }
    }
  }

  void turn_keys(int64_t first, int64_t count) {
    for (int64_t n = 0; n < kKeys; ++n) {
      turned_rows_[n] = &keys_[std::min(n, count - 1) * stride_];
      if (n >= count) continue;
      const int64_t at = frames_.table_row(first + n, first) * table_stride_;
      turn_row(turn_, key_rows_[n] + head_ * p_.k.head, &table_cos_[at], &table_sin_[at], 1.0f,
               &keys_[n * stride_]);
    }
  }

  template <int rows>
  void tile(int64_t first, int64_t count, Kind kind, bool masked) {
    const int64_t whole = round_up(count, kKeysAtOnce<rows>);
    const Rows<T> keys{key_rows_, head_ * p_.k.head}, values{value_rows_, head_ * p_.v.head};
    const Rows<float> turned{turned_rows_, 0};
    const bool last_head = head_ + 1 == p_.heads_k;
    const Rows<T> next{last_head ? next_rows_ : key_rows_, last_head ? 0 : (head_ + 1) * p_.k.head};
    const Rows<T> none{nullptr, 0};
    float* scores = scores_.data();
    for (int64_t r = 0; r < padded_; r += rows) {
      const int64_t row = (head_ * padded_ + r) * stride_;
      const Rows<T> ahead = r == 0 ? values : none;
      if (kind == kNear) {
        score_tile<rows>(&near_[row], stride_, turned, whole, stride_, ahead, scores);
      } else {
        score_tile<rows>(&far_[row], stride_, keys, whole, p_.head_dim, ahead, scores);
      }
      if (kind == kBoth) {
        score_tile<rows>(&near_[row], stride_, turned, whole, stride_, none, &other_[0]);
        choose<rows>(r, first, count);
      }
      if (masked) hide_later<rows>(r, first, count);
      std::fill(scores + count * rows, scores + whole * rows, -INFINITY);
      const floats kept =
          weigh_tile<rows>(scores, whole * rows, running_[(head_ * padded_ + r) / rows]);
      add_values<rows>(scores, values, count, p_.head_dim, kept, r == 0 ? next : none, &sums_[row],
                       stride_);
    }
  }

  // Near scores for the rows that are near.
  template <int rows>
  void choose(int64_t r, int64_t first, int64_t count) {
    for (int64_t n = 0; n < count; ++n) {
      for (int64_t i = 0; i < rows; ++i) {
        const bool near = first + n >= frames_.near_from(position((r + i) / group_));
        if (near) scores_[n * rows + i] = other_[n * rows + i];
      }
    }
  }

  template <int rows>
  void hide_later(int64_t r, int64_t first, int64_t count) {
    for (int64_t n = 0; n < count; ++n) {
      for (int64_t i = 0; i < rows; ++i) {
        if (first + n > position((r + i) / group_)) scores_[n * rows + i] = -INFINITY;
      }
    }
  }

  void finish(const DecodePart& part) {
    const int64_t width = p_.head_dim + 2, all = p_.heads_k * count_;
    float* out = p_.partial + (rows_->partial + part.index * all) * width;
    for (int64_t r = 0; r < all; ++r, out += width) {
      const int64_t row = r / count_ * padded_ + r % count_, lane = row % at_once_;
      const RunningMax& running = running_[row / at_once_];
      float sum = 0;
      for (int64_t n = lane; n < kFloats; n += at_once_) sum += running.sum[n];
      std::copy_n(&sums_[row * stride_], p_.head_dim, out);
      out[p_.head_dim] = running.largest[lane];
      out[p_.head_dim + 1] = sum;
    }
  }

  const DecodeParams& p_;
  const RowTurn turn_;
  const Frames frames_;
  const int64_t group_, stride_, table_stride_;
  const DecodeRows* rows_ = nullptr;
  int64_t tokens_ = 0;              // of these rows
  int64_t count_ = 0, padded_ = 0;  // rows of each head of k, and rounded up to passes
  int64_t at_once_ = 1;             // rows of a pass
  int64_t head_ = 0;
  const double *freq_ = nullptr, *table_freq_ = nullptr;
  Buffer<float> cos_, sin_, table_cos_, table_sin_;
  Buffer<float> raw_, far_, near_, sums_, keys_, scores_, other_;
  Buffer<RunningMax> running_;
  const T *key_rows_[kKeys], *value_rows_[kKeys], *next_rows_[kKeys];
  const float* turned_rows_[kKeys];
};

template <typename T>
void decode_parts(const DecodeParams& p, const DecodePart* parts, int64_t count) {
  Worker<T> worker(p);
  for (int64_t n = 0; n < count; ++n) worker.run(parts[n]);
}

template <typename Run>
void with_type(DType dtype, Run run) {
  switch (dtype) {
    case DType::bf16:
      return run(bf16{});
    case DType::f16:
      return run(f16{});
    default:
      return run(float{});
  }
}

}  // namespace

void EXTROPE_EXPAND(decode_parts_, EXTROPE_ISA)(const DecodeParams& p, const DecodePart* parts,
                                                int64_t count) {
  with_type(p.dtype, [&](auto type) { decode_parts<decltype(type)>(p, parts, count); });
}

void EXTROPE_EXPAND(merge_parts_, EXTROPE_ISA)(const DecodeParams& p, const DecodeRows* rows,
                                               int64_t count) {
  with_type(p.dtype, [&](auto type) { merge_parts<decltype(type)>(p, rows, count); });
}

}  // namespace extrope
