// Attends from a block of queries over one split of their keys.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/decode/queries.h"
#include "cpu/decode/tile.h"

namespace extrope {
namespace {

// A thread's state to attend from a block of queries to one split of their keys at a time.
template <typename T, typename Cached>
class Worker {
 public:
  explicit Worker(const DecodeParams& p)
      : p_(p),
        head_dim_(p.cache.head_dim),
        head_dim_v_(p.cache.head_dim_v),
        softcap_(static_cast<float>(p.softcap * kLog2E)),
        stride_v_(round_up(head_dim_v_, kFloats)),
        queries_(p) {}

  // Consecutive splits of the same queries load these once.
  void run(const Split& split) {
    const QueryBlock* block = split.queries;
    if (queries_.block() != block) queries_.start(block);
    const int64_t first = queries_.first_position(), last = queries_.last_position();
    const int64_t begin = block->first_key + split.index * block->split_size;
    const int64_t end = std::min(begin + block->split_size, last + 1);
    queries_.rotate(begin, end);
    start_sums();
    // Cuts at the beginnings of regions for the first or the last row: between two such edges the
    // set of regions that rows see does not change.
    for (int64_t next, j = begin; j < end; j = next) {
      next = end;
      for (int64_t r = 0; r <= p_.regions.count; ++r) {
        for (const int64_t edge : {p_.regions.start(r, first), p_.regions.start(r, last)}) {
          if (edge > j) next = std::min(next, edge);
        }
      }
      attend(j, next);
    }
    write_partial(split);
  }

 private:
  // The regions of some keys. Their scores need a mask if some row does not see all of these keys,
  // or if they are in several regions.
  struct Visible {
    int64_t first_region, last_region;
    bool masked;
  };

  void start_sums() {
    const int64_t all = p_.cache.heads * queries_.padded_rows();
    sums_.assign(all * stride_v_, 0.0f);
    softmax_.assign(all / queries_.rows_at_once(), {floats{} + kNone, floats{}});
  }

  // Finds what rows see between two edges.
  Visible visible(int64_t begin, int64_t end) const {
    const Regions& regions = p_.regions;
    const int64_t first = queries_.first_position(), last = queries_.last_position();
    int64_t lowest = 0, highest = regions.count - 1;
    while (lowest < highest && regions.start(lowest + 1, last) <= begin) ++lowest;
    while (highest > lowest && regions.start(highest, first) >= end) --highest;
    const bool masked = lowest < highest || begin < regions.start(0, last) || end > first + 1;
    return {lowest, highest, masked};
  }

  void attend(int64_t begin, int64_t end) {
    const Visible seen = visible(begin, end);
    find_next(begin);
    for (int64_t j = begin; j < end; j += kBlockN) {
      const int64_t count = std::min<int64_t>(kBlockN, end - j);
      std::copy_n(next_keys_, kBlockN, key_rows_);
      std::copy_n(next_values_, kBlockN, value_rows_);
      find_next(j + count);  // past the end of these keys too
      for (int64_t r = seen.first_region; r <= seen.last_region; ++r) {
        queries_.rotate_with_keys(r, j, count);
      }
      // All heads of a block in sequence: they usually are neighbours in memory.
      for (head_ = 0; head_ < p_.cache.heads; ++head_) {
        if (queries_.rows_at_once() == 1) attend_head<1>(j, count, seen);
        if (queries_.rows_at_once() == 2) attend_head<2>(j, count, seen);
        if (queries_.rows_at_once() == kMaxRows) attend_head<kMaxRows>(j, count, seen);
      }
    }
  }

  // Finds the block from key j on, if any.
  void find_next(int64_t j) {
    const int64_t end = queries_.last_position() + 1;
    next_in_a_run_ = false;
    if (j >= end) return;
    find_rows(p_.cache, p_.cache.k, *queries_.block(), j, end, next_keys_);
    find_rows(p_.cache, p_.cache.v, *queries_.block(), j, end, next_values_);
    next_in_a_run_ = in_a_run(next_keys_, p_.cache.k, head_dim_) &&
                     in_a_run(next_values_, p_.cache.v, head_dim_v_);
  }

  // Returns true if a block's rows are contiguous, per head or for all heads of a key together.
  bool in_a_run(const Cached* const* rows, const Plane& plane, int64_t head_dim) const {
    const bool all_heads = plane.head == head_dim;
    const int64_t row = all_heads ? p_.cache.heads * head_dim : head_dim;
    return plane.slot == row && rows[kBlockN - 1] - rows[0] == (kBlockN - 1) * row;
  }

  // Returns the beginning of this head's share of such a run.
  const char* share_of(const Cached* const* rows, const Plane& plane, int64_t head_dim) const {
    const bool all_heads = plane.head == head_dim;
    const Cached* first = rows[0] + head_ * (all_heads ? kBlockN * head_dim : plane.head);
    return reinterpret_cast<const char*>(first);
  }

  Ahead<Cached> ahead(const Rows<Cached>& values) const {
    const KVCache& cache = p_.cache;
    const bool last_head = head_ + 1 == cache.heads;
    Ahead<Cached> ahead{.values = values,
                        .next_keys = {last_head ? next_keys_ : key_rows_,
                                      last_head ? 0 : (head_ + 1) * cache.k.head}};
    ahead.key_bytes = head_dim_ * sizeof(Cached);
    ahead.value_bytes = head_dim_v_ * sizeof(Cached);
    if (next_in_a_run_) {
      ahead.far_keys = share_of(next_keys_, cache.k, head_dim_);
      ahead.far_values = share_of(next_values_, cache.v, head_dim_v_);
      ahead.far_key_bytes = ahead.key_bytes;
      ahead.with_sum = ahead.value_bytes / 2 / kLineBytes * kLineBytes;
      ahead.far_value_bytes = ahead.value_bytes - ahead.with_sum;
    }
    return ahead;
  }

  template <int rows>
  void attend_head(int64_t j, int64_t count, const Visible& seen) {
    const int64_t padded_keys = round_up(count, kKeysAtOnce<rows>);
    const Rows<Cached> keys{key_rows_, head_ * p_.cache.k.head};
    const Rows<Cached> values{value_rows_, head_ * p_.cache.v.head};
    Rows<float> rotated[kMaxRegions];
    for (int64_t r = seen.first_region; r <= seen.last_region; ++r) {
      if (KeyRotation* rotation = queries_.keys(r)) rotated[r] = rotation->rotate(keys, head_);
    }
    const BlockOfKeys block{keys, values, ahead(values), rotated, j, count, padded_keys};
    for (int64_t m = 0; m < queries_.padded_rows(); m += rows) {
      if (const int64_t left = queries_.rows() - m; left <= 2) {
        attend_rows<rows, std::min(rows, 2)>(block, m, seen);
      } else if (left == 3) {
        attend_rows<rows, std::min(rows, 3)>(block, m, seen);
      } else {
        attend_rows<rows, rows>(block, m, seen);
      }
    }
  }

  // The keys and values of one head in a block, the rows after them, and its keys rotated for the
  // regions.
  struct BlockOfKeys {
    Rows<Cached> keys, values;
    Ahead<Cached> ahead;
    const Rows<float>* rotated;
    int64_t first, count, padded;
  };

  // Works on the rows from m on: `valid` of them are queries.
  template <int rows, int valid>
  void attend_rows(const BlockOfKeys& block, int64_t m, const Visible& seen) {
    const int64_t row = head_ * queries_.padded_rows() + m, scores = block.padded * rows;
    const int64_t stride = queries_.stride();
    Ahead<Cached> none, ahead = m == 0 ? block.ahead : none;
    for (int64_t r = seen.first_region; r <= seen.last_region; ++r) {
      Ahead<Cached>& meanwhile = r == seen.first_region ? ahead : none;
      const float* q = queries_.row(r, head_, m);
      float* to = r == seen.first_region ? scores_ : region_scores_;
      if (queries_.keys(r)) {
        score_tile<rows, valid>(q, stride, block.rotated[r], block.padded, stride, meanwhile, to);
      } else {
        score_tile<rows, valid>(q, stride, block.keys, block.padded, head_dim_, meanwhile, to);
      }
      if (r > seen.first_region) select_region<rows>(r, m, block.first, block.count);
    }
    if (softcap_ > 0) cap_tile(softcap_, scores_, scores);
    if (seen.masked) mask<rows>(m, block.first, block.count);
    std::fill(scores_ + block.count * rows, scores_ + scores, -INFINITY);
    const floats rescale = softmax_tile<rows>(scores_, scores, softmax_[row / rows]);
    add_values<rows, valid>(scores_, block.values, block.count, head_dim_v_, rescale, ahead,
                            &sums_[row * stride_v_], stride_v_);
  }

  // Replaces earlier regions' scores by region r's, from each row's start of that region on.
  template <int rows>
  void select_region(int64_t r, int64_t m, int64_t j, int64_t count) {
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t start = p_.regions.start(r, queries_.position_of(m + i)) - j;
      for (int64_t n = std::max<int64_t>(start, 0); n < count; ++n) {
        scores_[n * rows + i] = region_scores_[n * rows + i];
      }
    }
  }

  // Hides the keys before a row's first one and those past its own.
  template <int rows>
  void mask(int64_t m, int64_t j, int64_t count) {
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t at = queries_.position_of(m + i), first = p_.regions.start(0, at);
      for (int64_t n = 0; n < count; ++n) {
        if (j + n < first || j + n > at) scores_[n * rows + i] = -INFINITY;
      }
    }
  }

  void write_partial(const Split& split) {
    const int64_t rows = queries_.rows(), at_once = queries_.rows_at_once();
    const int64_t width = head_dim_v_ + 2, all = p_.cache.heads * rows;
    float* out = p_.partial + (split.queries->partial + split.index * all) * width;
    for (int64_t r = 0; r < all; ++r, out += width) {
      const int64_t row = r / rows * queries_.padded_rows() + r % rows, lane = row % at_once;
      const Softmax& softmax = softmax_[row / at_once];
      float sum = 0;
      for (int64_t n = lane; n < kFloats; n += at_once) sum += softmax.row_sum[n];
      std::copy_n(&sums_[row * stride_v_], head_dim_v_, out);
      if constexpr (kReadInPairs<Cached>) order_by_dims(out, head_dim_v_);
      out[head_dim_v_] = softmax.row_max[lane];
      out[head_dim_v_ + 1] = sum;
    }
  }

  const DecodeParams& p_;
  const int64_t head_dim_, head_dim_v_;  // for queries and keys, for values
  const float softcap_;                  // log2(e) included; 0: none
  const int64_t stride_v_;               // head_dim_v, padded to whole vectors
  Queries<T, Cached> queries_;
  int64_t head_ = 0;    // the current head of k
  Buffer<float> sums_;  // sums over values
  Buffer<Softmax> softmax_;
  // Scores of a block of keys: merged from all regions, and those of the current region.
  alignas(64) float scores_[kBlockN * kMaxRows], region_scores_[kBlockN * kMaxRows];
  const Cached *key_rows_[kBlockN], *value_rows_[kBlockN];
  const Cached *next_keys_[kBlockN], *next_values_[kBlockN];
  bool next_in_a_run_ = false;  // both have contiguous rows
};

}  // namespace
}  // namespace extrope
