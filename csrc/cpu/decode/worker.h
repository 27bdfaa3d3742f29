// The attention of a block of queries over one split of their keys.
//
// Cached keys are rotated to their stored position. A region that wants them there uses them as
// they lie, and rotates queries alone; for any other they rotate on, block by block.
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>

#include "cpu/decode/key_rotation.h"
#include "cpu/decode/tile.h"

namespace extrope {
namespace {

constexpr int kMaxRows = 4;  // of one pass over a block of keys: the most of rows_at_once_
constexpr double kLog2E = 1.4426950408889634;

// What a thread keeps to attend from a block of queries to one split of their keys at a time.
template <typename T, typename Cached>
class Worker {
 public:
  explicit Worker(const DecodeParams& p)
      : p_(p),
        rotation_{p.cache.head_dim, p.freqs.half, p.freqs.interleaved},
        head_dim_(p.cache.head_dim),
        head_dim_v_(p.cache.head_dim_v),
        group_(p.heads_q / p.cache.heads),
        logit_scale_(p.softmax_scale * (p.softcap > 0 ? 1 / p.softcap : kLog2E)),
        softcap_(static_cast<float>(p.softcap * kLog2E)),
        stride_(round_up(head_dim_, kFloats)),
        stride_v_(round_up(head_dim_v_, kFloats)),
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
    rows_ = tokens_ * group_;
    rows_at_once_ = rows_ <= 2 ? rows_ : kMaxRows;
    padded_rows_ = round_up(rows_, rows_at_once_);
    inv_freq_ = p_.freqs.inv_freq + queries_->sequence * p_.freqs.batch;
    first_position_ = position(0), last_position_ = position(tokens_ - 1);
    const int64_t begin = queries_->first_key + split.index * queries_->split_size;
    const int64_t end = std::min(begin + queries_->split_size, last_position_ + 1);
    load_queries(begin, end);
    // Cut where a region begins for the first or the last row: between two such edges the regions
    // that any row sees are the same.
    for (int64_t next, j = begin; j < end; j = next) {
      next = end;
      for (int64_t r = 0; r <= p_.regions.count; ++r) {
        for (const int64_t edge :
             {p_.regions.start(r, first_position_), p_.regions.start(r, last_position_)}) {
          if (edge > j) next = std::min(next, edge);
        }
      }
      attend(j, next);
    }
    write_partial(split);
  }

 private:
  // The queries as a region rotates them, and the rotation of its keys where they are not stored as
  // it wants them.
  struct Frame {
    Buffer<float> q;
    std::optional<KeyRotation> keys;
  };
  // The regions of some keys, and whether their scores need a mask: some row sees fewer than all of
  // these keys, or keys of several regions.
  struct Visible {
    int64_t first_region, last_region;
    bool masked;
  };

  int64_t position(int64_t token) const { return queries_->first_position + token; }

  void load_queries(int64_t begin, int64_t end) {
    const int64_t all = p_.cache.heads * padded_rows_;
    scaled_q_.assign(all * stride_, 0.0f);
    sums_.assign(all * stride_v_, 0.0f);
    softmax_.assign(all / rows_at_once_, {floats{} + kNone, floats{}});
    for (int64_t token = 0; token < tokens_; ++token) {
      const float scale = logit_scale(token);
      for (int64_t head = 0; head < p_.heads_q; ++head) {
        const T* q = static_cast<const T*>(p_.q) + queries_->batch * p_.q_batch +
                     (queries_->first_token + token) * p_.q_seq + head * p_.q_head;
        float* scaled = &scaled_q_[q_offset(token, head)];
        const float factor = p_.cache.is_e4m3() ? scale * p_.cache.k_scale[head / group_] : scale;
        for (int64_t d = 0; d < head_dim_; ++d) scaled[d] = widen(q[d]) * factor;
      }
    }
    for (int64_t r = 0; r < p_.regions.count; ++r) {
      const bool seen = p_.regions.start(r, first_position_) < end &&
                        begin < p_.regions.start(r + 1, last_position_);
      if (!seen) continue;
      frames_[r].q.assign(all * stride_, 0.0f);
      if (!frames_[r].keys) rotate_queries(r, 0.0);
    }
  }

  // The factor of all logits of a token, log2(e) included unless they are capped.
  float logit_scale(int64_t token) const {
    const int64_t i = position(token);
    double scale = logit_scale_;
    if (p_.log_n > 0 && i > 0) scale *= std::max(1.0, std::log(i + 1.0) / std::log(p_.log_n));
    if (p_.query_scale.data) {
      scale *= p_.query_scale.of(queries_->batch, queries_->first_token + token);
    }
    return static_cast<float>(scale);
  }

  // Where the row of a token and a q head starts in scaled_q_ and the frames' q.
  int64_t q_offset(int64_t token, int64_t head) const {
    return (head / group_ * padded_rows_ + token * group_ + head % group_) * stride_;
  }

  // Rotates the queries of region r to q_map(i) - origin.
  void rotate_queries(int64_t r, double origin) {
    for (int64_t token = 0; token < tokens_; ++token) {
      const double to = p_.regions.at[r].q_map(position(token)) - origin;
      const Angles angles{
          .position = to, .amplitude = p_.amplitude, .decay = to, .log_decay = p_.freqs.log_decay};
      fill_sincos(inv_freq_, p_.freqs.half, angles, cos_.data(), sin_.data());
      for (int64_t head = 0; head < p_.heads_q; ++head) {
        const int64_t row = q_offset(token, head);
        rotate_to_float(rotation_, &scaled_q_[row], cos_.data(), sin_.data(), 1.0f,
                        &frames_[r].q[row]);
        if (!frames_[r].keys) follow_cache(&frames_[r].q[row]);
      }
    }
  }

  // Brings a query to the order and the unit in which load_dims reads keys.
  void follow_cache(float* q) const {
    if constexpr (kReadInPairs<Cached>) order_by_words(q, head_dim_);
    for (int64_t d = 0; kUnit<Cached> != 1 && d < head_dim_; ++d) q[d] *= kUnit<Cached>;
  }

  // What rows see of the keys between two edges.
  Visible visible(int64_t begin, int64_t end) const {
    const Regions& regions = p_.regions;
    int64_t lowest = 0, highest = regions.count - 1;
    while (lowest < highest && regions.start(lowest + 1, last_position_) <= begin) ++lowest;
    while (highest > lowest && regions.start(highest, first_position_) >= end) --highest;
    const bool masked =
        lowest < highest || begin < regions.start(0, last_position_) || end > first_position_ + 1;
    return {lowest, highest, masked};
  }

  void attend(int64_t begin, int64_t end) {
    const Visible seen = visible(begin, end);
    find_rows(p_.cache, p_.cache.k, *queries_, begin, end, next_rows_);
    for (int64_t j = begin; j < end; j += kBlockN) {
      const int64_t count = std::min<int64_t>(kBlockN, end - j);
      std::copy_n(next_rows_, kBlockN, key_rows_);
      find_rows(p_.cache, p_.cache.v, *queries_, j, end, value_rows_);
      if (const int64_t next = j + kBlockN; next < end) {
        find_rows(p_.cache, p_.cache.k, *queries_, next, end, next_rows_);
      }
      for (int64_t r = seen.first_region; r <= seen.last_region; ++r) {
        if (frames_[r].keys) rotate_queries(r, frames_[r].keys->start_block(inv_freq_, j, count));
      }
      // All heads of a block, one after another: they usually are neighbours in memory.
      for (head_ = 0; head_ < p_.cache.heads; ++head_) {
        if (rows_at_once_ == 1) attend_head<1>(j, count, seen);
        if (rows_at_once_ == 2) attend_head<2>(j, count, seen);
        if (rows_at_once_ == kMaxRows) attend_head<kMaxRows>(j, count, seen);
      }
    }
  }

  template <int rows>
  void attend_head(int64_t j, int64_t count, const Visible& seen) {
    const int64_t padded_keys = round_up(count, kKeysAtOnce<rows>);
    const Rows<Cached> keys{key_rows_, head_ * p_.cache.k.head};
    const Rows<Cached> values{value_rows_, head_ * p_.cache.v.head};
    const bool last_head = head_ + 1 == p_.cache.heads;
    const Rows<Cached> next{last_head ? next_rows_ : key_rows_,
                            last_head ? 0 : (head_ + 1) * p_.cache.k.head};
    Rows<float> rotated[kMaxRegions];
    for (int64_t r = seen.first_region; r <= seen.last_region; ++r) {
      if (frames_[r].keys) rotated[r] = frames_[r].keys->rotate(keys);
    }
    const BlockOfKeys block{keys, values, next, rotated, j, count, padded_keys};
    for (int64_t m = 0; m < padded_rows_; m += rows) {
      if (rows_ - m <= 2) {
        attend_rows<rows, std::min(rows, 2)>(block, m, seen);
      } else if (rows_ - m == 3) {
        attend_rows<rows, std::min(rows, 3)>(block, m, seen);
      } else {
        attend_rows<rows, rows>(block, m, seen);
      }
    }
  }

  // The keys and values of one head in a block, its keys as the regions rotate them, and the rows
  // of the head or the block that comes next.
  struct BlockOfKeys {
    Rows<Cached> keys, values, next;
    const Rows<float>* rotated;
    int64_t first, count, padded;
  };

  // The rows from m on: `valid` of them are queries.
  template <int rows, int valid>
  void attend_rows(const BlockOfKeys& block, int64_t m, const Visible& seen) {
    const int64_t row = head_ * padded_rows_ + m, scores = block.padded * rows;
    const Rows<Cached> none{nullptr, 0};
    Rows<Cached> ahead = m == 0 ? block.values : none;
    for (int64_t r = seen.first_region; r <= seen.last_region; ++r, ahead = none) {
      const float* q = &frames_[r].q[row * stride_];
      float* to = r == seen.first_region ? scores_ : region_scores_;
      if (frames_[r].keys) {
        score_tile<rows, valid>(q, stride_, block.rotated[r], block.padded, stride_, ahead,
                                head_dim_v_, to);
      } else {
        score_tile<rows, valid>(q, stride_, block.keys, block.padded, head_dim_, ahead, head_dim_v_,
                                to);
      }
      if (r > seen.first_region) select_region<rows>(r, m, block.first, block.count);
    }
    if (softcap_ > 0) cap_tile(softcap_, scores_, scores);
    if (seen.masked) mask<rows>(m, block.first, block.count);
    std::fill(scores_ + block.count * rows, scores_ + scores, -INFINITY);
    const floats rescale = softmax_tile<rows>(scores_, scores, softmax_[row / rows]);
    add_values<rows, valid>(scores_, block.values, block.count, head_dim_v_, rescale,
                            m == 0 ? block.next : none, head_dim_, &sums_[row * stride_v_],
                            stride_v_);
  }

  // From a row's start of region r on, the scores in that region in place of earlier regions'.
  template <int rows>
  void select_region(int64_t r, int64_t m, int64_t j, int64_t count) {
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t start = p_.regions.start(r, position((m + i) / group_)) - j;
      for (int64_t n = std::max<int64_t>(start, 0); n < count; ++n) {
        scores_[n * rows + i] = region_scores_[n * rows + i];
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

  void write_partial(const Split& split) {
    const int64_t width = head_dim_v_ + 2, all = p_.cache.heads * rows_;
    float* out = p_.partial + (queries_->partial + split.index * all) * width;
    for (int64_t r = 0; r < all; ++r, out += width) {
      const int64_t row = r / rows_ * padded_rows_ + r % rows_, lane = row % rows_at_once_;
      const Softmax& softmax = softmax_[row / rows_at_once_];
      float sum = 0;
      for (int64_t n = lane; n < kFloats; n += rows_at_once_) sum += softmax.row_sum[n];
      std::copy_n(&sums_[row * stride_v_], head_dim_v_, out);
      if constexpr (kReadInPairs<Cached>) order_by_dims(out, head_dim_v_);
      out[head_dim_v_] = softmax.row_max[lane];
      out[head_dim_v_ + 1] = sum;
    }
  }

  const DecodeParams& p_;
  const RowRotation rotation_;
  const int64_t head_dim_, head_dim_v_;  // of queries and keys, of values
  const int64_t group_;                  // q heads of a head of k
  const double logit_scale_;             // of all logits: over softcap, or log2(e) included
  const float softcap_;                  // log2(e) included; 0: none
  const int64_t stride_, stride_v_;      // the two head_dims, padded to whole vectors
  const QueryBlock* queries_ = nullptr;
  int64_t tokens_ = 0;                              // of these queries
  int64_t first_position_ = 0, last_position_ = 0;  // their positions
  int64_t rows_ = 0;                                // of each head of k: tokens times group
  int64_t padded_rows_ = 0;                         // a multiple of rows_at_once_
  int64_t rows_at_once_ = 1;                        // of one pass over a block of keys
  int64_t head_ = 0;                                // of k, at work
  const double* inv_freq_ = nullptr;
  Frame frames_[kMaxRegions];
  Buffer<float> cos_, sin_;
  Buffer<float> scaled_q_, sums_;  // queries times the scale of their logits; sums over values
  Buffer<Softmax> softmax_;
  // Of a block of keys: those of all regions in one, and those of the region at work.
  alignas(64) float scores_[kBlockN * kMaxRows], region_scores_[kBlockN * kMaxRows];
  const Cached *key_rows_[kBlockN], *value_rows_[kBlockN], *next_rows_[kBlockN];
};

}  // namespace
}  // namespace extrope
