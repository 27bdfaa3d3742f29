// Attention over a key/value cache on the CPU. Compiled once for each instruction set, with
// EXTROPE_ISA as its name.
//
// Cached keys are rotated to their stored position. A region that wants them there uses them as
// they lie, and rotates queries alone; for any other they rotate on, block by block.

#include <algorithm>
#include <cmath>
#include <optional>

#include "cpu/decode/kernels.h"
#include "cpu/decode/key_rotation.h"
#include "cpu/decode/merge.h"
#include "cpu/decode/tile.h"
#include "cpu/decode/types.h"

namespace extrope {
namespace {

constexpr int kMaxRows = 4;  // of one pass over a block of keys
constexpr double kLog2E = 1.4426950408889634;

// The work on a block of queries and some keys: scratch memory of a thread.
template <typename T, typename Cached>
class Worker {
 public:
  explicit Worker(const DecodeParams& p)
      : p_(p),
        rotation_{p.cache.head_dim, p.freqs.half, p.freqs.interleaved},
        dim_(p.cache.head_dim),
        dim_v_(p.cache.head_dim_v),
        group_(p.heads_q / p.cache.heads),
        scale_(p.softmax_scale * (p.softcap > 0 ? 1 / p.softcap : kLog2E)),
        softcap_(static_cast<float>(p.softcap * kLog2E)),
        stride_(round_up(dim_, kFloats)),
        stride_v_(round_up(dim_v_, kFloats)),
        cos_(round_up(p.freqs.half, kFloats)),
        sin_(cos_.size()) {
    for (int64_t r = 0; r < p.regions.count; ++r) {
      const PositionMap& k_map = p.regions.at[r].k_map;
      if (!(k_map == p.regions.stored)) frames_[r].keys.emplace(p, k_map);
    }
  }

  void run(const Split& split) {
    queries_ = split.queries;
    tokens_ = queries_->last_token - queries_->first_token;
    count_ = tokens_ * group_;
    at_once_ = count_ <= 2 ? count_ : kMaxRows;
    padded_ = round_up(count_, at_once_);
    inv_freq_ = p_.freqs.inv_freq + queries_->sequence * p_.freqs.batch;
    first_ = position(0), last_ = position(tokens_ - 1);
    const int64_t begin = queries_->first_key + split.index * queries_->split_size;
    const int64_t end = std::min(begin + queries_->split_size, last_ + 1);
    prepare(begin, end);
    // Between two edges every row sees keys of the same regions.
    for (int64_t next, j = begin; j < end; j = next) {
      next = end;
      for (int64_t r = 0; r <= p_.regions.count; ++r) {
        for (const int64_t edge : {p_.regions.start(r, first_), p_.regions.start(r, last_)}) {
          if (edge > j) next = std::min(next, edge);
        }
      }
      attend(j, next);
    }
    finish(split);
  }

 private:
  // A region's queries, rotated, and what keys need where they are not stored as it wants them.
  struct Frame {
    Buffer<float> q;
    std::optional<KeyRotation> keys;
  };
  // Regions that rows see keys of, and whether some row sees fewer than all of these keys, or
  // keys of several regions.
  struct Visible {
    int64_t first_region, last_region;
    bool masked;
  };

  int64_t position(int64_t token) const { return queries_->first_position + token; }

  void prepare(int64_t begin, int64_t end) {
    const int64_t all = p_.cache.heads * padded_;
    raw_.assign(all * stride_, 0.0f);
    sums_.assign(all * stride_v_, 0.0f);
    softmax_.assign(all / at_once_, {floats{} + kNone, floats{}});
    for (int64_t token = 0; token < tokens_; ++token) {
      const float scale = scale_of(token);
      for (int64_t head = 0; head < p_.heads_q; ++head) {
        const T* q = static_cast<const T*>(p_.q) + queries_->batch * p_.q_batch +
                     (queries_->first_token + token) * p_.q_seq + head * p_.q_head;
        float* raw = &raw_[query(token, head)];
        const float own = p_.cache.is_e4m3() ? scale * p_.cache.k_scale[head / group_] : scale;
        for (int64_t d = 0; d < dim_; ++d) raw[d] = widen(q[d]) * own;
      }
    }
    for (int64_t r = 0; r < p_.regions.count; ++r) {
      const bool seen = p_.regions.start(r, first_) < end && begin < p_.regions.start(r + 1, last_);
      if (!seen) continue;
      frames_[r].q.assign(all * stride_, 0.0f);
      if (!frames_[r].keys) rotate_queries(r, 0.0);
    }
  }

  // Of all logits of a row.
  float scale_of(int64_t token) const {
    const int64_t i = position(token);
    double scale = scale_;
    if (p_.log_n > 0 && i > 0) scale *= std::max(1.0, std::log(i + 1.0) / std::log(p_.log_n));
    if (p_.query_scale.data) {
      scale *= p_.query_scale.of(queries_->batch, queries_->first_token + token);
    }
    return static_cast<float>(scale);
  }

  // Where a query's row starts in raw_ and the frames' q.
  int64_t query(int64_t token, int64_t head) const {
    return (head / group_ * padded_ + token * group_ + head % group_) * stride_;
  }

  // To q_map(i) - origin.
  void rotate_queries(int64_t r, double origin) {
    for (int64_t token = 0; token < tokens_; ++token) {
      const double to = p_.regions.at[r].q_map(position(token)) - origin;
      const Angles angles{to, p_.amplitude, to, p_.freqs.log_decay, false};
      fill_sincos(inv_freq_, p_.freqs.half, angles, cos_.data(), sin_.data());
      for (int64_t head = 0; head < p_.heads_q; ++head) {
        const int64_t row = query(token, head);
        rotate_row(rotation_, &raw_[row], cos_.data(), sin_.data(), 1.0f, &frames_[r].q[row]);
      }
    }
  }

  // Where the keys or values from..end-1 lie; the last one again to the end of the block.
  void point(const Plane& plane, int64_t from, int64_t end, const Cached** rows) const {
    const int64_t count = std::min<int64_t>(kBlockN, end - from);
    const Cached* base = static_cast<const Cached*>(plane.data);
    int64_t slot = queries_->first_slot + from, in_page = slot, size = slot + count;
    const int32_t* page = nullptr;
    if (p_.cache.block_table) {
      size = p_.cache.page_size;
      page = p_.cache.block_table + queries_->sequence * p_.cache.table_batch + slot / size;
      in_page = slot % size;
    }
    int64_t block = page ? *page : queries_->sequence;
    for (int64_t n = 0; n < count; ++n, ++in_page) {
      if (in_page == size) block = *++page, in_page = 0;
      rows[n] = base + block * plane.block + in_page * plane.slot;
    }
    std::fill(rows + count, rows + kBlockN, rows[count - 1]);
  }

  // Of keys between two edges.
  Visible visible(int64_t begin, int64_t end) const {
    const Regions& regions = p_.regions;
    int64_t lowest = 0, highest = regions.count - 1;
    while (lowest < highest && regions.start(lowest + 1, last_) <= begin) ++lowest;
    while (highest > lowest && regions.start(highest, first_) >= end) --highest;
    return {lowest, highest,
            lowest < highest || begin < regions.start(0, last_) || end > first_ + 1};
  }

  void attend(int64_t begin, int64_t end) {
    const Visible seen = visible(begin, end);
    point(p_.cache.k, begin, end, next_rows_);
    for (int64_t j = begin; j < end; j += kBlockN) {
      const int64_t count = std::min<int64_t>(kBlockN, end - j);
      std::copy_n(next_rows_, kBlockN, key_rows_);
      point(p_.cache.v, j, end, value_rows_);
      if (j + kBlockN < end) point(p_.cache.k, j + kBlockN, end, next_rows_);
      for (int64_t r = seen.first_region; r <= seen.last_region; ++r) {
        if (frames_[r].keys) rotate_queries(r, frames_[r].keys->start_block(inv_freq_, j, count));
      }
      // All heads of a block, one after another: they usually are neighbours in memory.
      for (head_ = 0; head_ < p_.cache.heads; ++head_) {
        switch (at_once_) {
          case 1:
            attend_head<1>(j, count, seen);
            break;
          case 2:
            attend_head<2>(j, count, seen);
            break;
          default:
            attend_head<4>(j, count, seen);
        }
      }
    }
  }

  template <int rows>
  void attend_head(int64_t j, int64_t count, const Visible& seen) {
    const int64_t whole = round_up(count, kKeysAtOnce<rows>);
    const Rows<Cached> keys{key_rows_, head_ * p_.cache.k.head};
    const Rows<Cached> values{value_rows_, head_ * p_.cache.v.head}, none{nullptr, 0};
    const bool last_head = head_ + 1 == p_.cache.heads;
    const Rows<Cached> next{last_head ? next_rows_ : key_rows_,
                            last_head ? 0 : (head_ + 1) * p_.cache.k.head};
    Rows<float> rotated[kMaxRegions];
    for (int64_t r = seen.first_region; r <= seen.last_region; ++r) {
      if (frames_[r].keys) rotated[r] = frames_[r].keys->rotate(keys);
    }
    for (int64_t m = 0; m < padded_; m += rows) {
      const int64_t row = head_ * padded_ + m;
      Rows<Cached> ahead = m == 0 ? values : none;
      for (int64_t r = seen.first_region; r <= seen.last_region; ++r, ahead = none) {
        const float* q = &frames_[r].q[row * stride_];
        float* scores = r == seen.first_region ? scores_ : other_;
        if (frames_[r].keys) {
          score_tile<rows>(q, stride_, rotated[r], whole, stride_, ahead, dim_v_, scores);
        } else {
          score_tile<rows>(q, stride_, keys, whole, dim_, ahead, dim_v_, scores);
        }
        if (r > seen.first_region) take<rows>(r, m, j, count);
      }
      if (softcap_ > 0) cap_tile(softcap_, scores_, whole * rows);
      if (seen.masked) mask<rows>(m, j, count);
      std::fill(scores_ + count * rows, scores_ + whole * rows, -INFINITY);
      const floats rescale = softmax_tile<rows>(scores_, whole * rows, softmax_[row / rows]);
      add_values<rows>(scores_, values, count, dim_v_, rescale, m == 0 ? next : none, dim_,
                       &sums_[row * stride_v_], stride_v_);
    }
  }

  // The scores of region r in place of those before it, for the keys from its start on.
  template <int rows>
  void take(int64_t r, int64_t m, int64_t j, int64_t count) {
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t start = p_.regions.start(r, position((m + i) / group_)) - j;
      for (int64_t n = std::max<int64_t>(start, 0); n < count; ++n) {
        scores_[n * rows + i] = other_[n * rows + i];
      }
    }
  }

  // Hides the keys before a row's first one and those past its own.
  template <int rows>
  void mask(int64_t m, int64_t j, int64_t count) {
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t at = position((m + i) / group_), first = p_.regions.start(0, at);
      for (int64_t n = 0; n < count; ++n) {
        if (j + n < first || j + n > at) scores_[n * rows + i] = -INFINITY;
      }
    }
  }

  void finish(const Split& split) {
    const int64_t width = dim_v_ + 2, all = p_.cache.heads * count_;
    float* out = p_.partial + (queries_->partial + split.index * all) * width;
    for (int64_t r = 0; r < all; ++r, out += width) {
      const int64_t row = r / count_ * padded_ + r % count_, lane = row % at_once_;
      const Softmax& softmax = softmax_[row / at_once_];
      float sum = 0;
      for (int64_t n = lane; n < kFloats; n += at_once_) sum += softmax.row_sum[n];
      std::copy_n(&sums_[row * stride_v_], dim_v_, out);
      out[dim_v_] = softmax.row_max[lane];
      out[dim_v_ + 1] = sum;
    }
  }

  const DecodeParams& p_;
  const RowRotation rotation_;
  const int64_t dim_, dim_v_, group_;  // dims of queries and keys, of values
  const double scale_;                 // of all logits: over softcap, or log2(e) included
  const float softcap_;                // log2(e) included; 0: none
  const int64_t stride_, stride_v_;    // and of their rows here
  const QueryBlock* queries_ = nullptr;
  int64_t tokens_ = 0;              // of these queries
  int64_t first_ = 0, last_ = 0;    // their positions
  int64_t count_ = 0, padded_ = 0;  // rows of each head of k, and rounded up to passes
  int64_t at_once_ = 1;             // rows of a pass
  int64_t head_ = 0;
  const double* inv_freq_ = nullptr;
  Frame frames_[kMaxRegions];
  Buffer<float> cos_, sin_, raw_, sums_;
  Buffer<Softmax> softmax_;
  alignas(64) float scores_[kBlockN * kMaxRows], other_[kBlockN * kMaxRows];
  const Cached *key_rows_[kBlockN], *value_rows_[kBlockN], *next_rows_[kBlockN];
};

}  // namespace

void EXTROPE_EXPAND(decode_splits_, EXTROPE_ISA)(const DecodeParams& p, const Split* splits,
                                                 int64_t count) {
  with_types(p.cache, [&](auto type, auto cached) {
    Worker<decltype(type), decltype(cached)> worker(p);
    for (int64_t n = 0; n < count; ++n) worker.run(splits[n]);
  });
}

void EXTROPE_EXPAND(merge_splits_, EXTROPE_ISA)(const DecodeParams& p, const QueryBlock* queries,
                                                int64_t count) {
  with_type(p.cache.dtype, [&](auto type) { merge_splits<decltype(type)>(p, queries, count); });
}

}  // namespace extrope
