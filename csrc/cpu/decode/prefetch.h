// The rows of a block of keys and of the block after it, and the prefetches of both.
#pragma once

#include <algorithm>

#include "cpu/decode/rows.h"

namespace extrope {
namespace {

constexpr int64_t kLineBytes = 64;  // in a processor's caches

// Prefetches the lines of some bytes into caches from `level` on; returns the address after them.
template <int level>
EXTROPE_INLINE const char* fetch(const char* from, int64_t bytes) {
  for (const char* end = from + bytes; from < end; from += kLineBytes) {
    __builtin_prefetch(from, 0, 4 - level);
  }
  return from;
}

// Prefetches of later rows, spread over the work on a head of a block: memory answers while the
// core computes, and a core can wait for only a dozen lines or so at once.
//
// The head's own values and the next head's keys are needed soon, in the first-level cache. This
// head's keys and values in the next block go to the second level: one block ahead is far enough
// for memory, and too far for the first level. At most half of those values, in whole lines, wait
// for the sums over values, which take too little time for more. If the next block's rows are not
// contiguous, as in scattered pages of a few rows, none of them is prefetched.
template <typename T>
struct Prefetch {
  RowPointers<T> values{}, next_keys{};  // none if `at` is nullptr
  const char *far_keys = nullptr, *far_values = nullptr;
  int64_t key_bytes = 0, value_bytes = 0;  // per row
  // Bytes of a far row: of a key and a value beside the logits, of a value beside the sums.
  int64_t far_key_bytes = 0, far_value_bytes_at_logits = 0, far_value_bytes_at_sum = 0;

  // Prefetches during the logits of `count` keys from j on.
  EXTROPE_INLINE void fetch_at_logits(int64_t j, int count) {
    if (!values.at) return;
    for (int k = 0; k < count; ++k) fetch<1>(values.bytes(j + k), value_bytes);
    far_keys = fetch<2>(far_keys, count * far_key_bytes);
    far_values = fetch<2>(far_values, count * far_value_bytes_at_logits);
  }

  // Prefetches during the sum over value j.
  EXTROPE_INLINE void fetch_at_value(int64_t j) {
    if (!values.at) return;
    fetch<1>(next_keys.bytes(j), key_bytes);
    far_values = fetch<2>(far_values, far_value_bytes_at_sum);
  }
};

// The rows of the current block, and of the next one. `end` is the first key that no query sees.
template <typename T>
class BlockRows {
 public:
  explicit BlockRows(const KVCache& cache) : cache_(cache) {}

  // Finds the rows of the block from `key` on, to be the current one after advance().
  void find_next(const QueryBlock& queries, int64_t key, int64_t end) {
    next_is_contiguous_ = false;
    if (key >= end) return;
    // Each key's row in head 0, through the sequence's pages if the cache is paged.
    find_rows(cache_, cache_.k, queries, key, end, next_keys_);
    find_rows(cache_, cache_.v, queries, key, end, next_values_);
    next_is_contiguous_ = is_contiguous(next_keys_, cache_.k, cache_.head_dim) &&
                          is_contiguous(next_values_, cache_.v, cache_.head_dim_v);
  }

  // Makes the next block the current one, and finds the block from key `next` on.
  void advance(const QueryBlock& queries, int64_t next, int64_t end) {
    std::copy_n(next_keys_, kBlockN, keys_);
    std::copy_n(next_values_, kBlockN, values_);
    find_next(queries, next, end);
  }

  // The current block's rows in a head of k.
  RowPointers<T> keys(int64_t head) const { return {keys_, head * cache_.k.head}; }
  RowPointers<T> values(int64_t head) const { return {values_, head * cache_.v.head}; }

  // Returns what is prefetched beside a head's work: its own values, the next head's keys (after
  // the last head, the first one's of the next block), and (far_) its share of the next block, if
  // contiguous.
  Prefetch<T> prefetch(int64_t head) const {
    const bool last_head = head + 1 == cache_.heads;
    Prefetch<T> later{.values = values(head)};
    later.next_keys = last_head ? RowPointers<T>{next_keys_, 0} : keys(head + 1);
    // Beside key n's logits: value n, far key n, the rest of far value n. Beside the sum over value
    // n: key n of the next head, and half of far value n, in whole lines: sums take less time.
    later.key_bytes = cache_.head_dim * sizeof(T);
    later.value_bytes = cache_.head_dim_v * sizeof(T);
    if (next_is_contiguous_) {
      later.far_keys = share_of(next_keys_, cache_.k, head, cache_.head_dim);
      later.far_values = share_of(next_values_, cache_.v, head, cache_.head_dim_v);
      later.far_key_bytes = later.key_bytes;
      later.far_value_bytes_at_sum = later.value_bytes / 2 / kLineBytes * kLineBytes;
      later.far_value_bytes_at_logits = later.value_bytes - later.far_value_bytes_at_sum;
    }
    return later;
  }

 private:
  // Returns true if a block's rows are contiguous, per head or for all heads of a key together.
  // Only prefetches depend on it: the end rows suffice. A Plane is the keys or the values of the
  // cache; its strides: `head` from one head to the next, `slot` from one key to the next.
  bool is_contiguous(const T* const* rows, const Plane& plane, int64_t head_dim) const {
    const bool all_heads = plane.head == head_dim;
    const int64_t row = all_heads ? cache_.heads * head_dim : head_dim;
    return plane.slot == row && rows[kBlockN - 1] - rows[0] == (kBlockN - 1) * row;
  }

  // Returns where a head's share of a block's contiguous rows begins: its own rows, or with all
  // heads together an equal share of them.
  const char* share_of(const T* const* rows, const Plane& plane, int64_t head,
                       int64_t head_dim) const {
    const bool all_heads = plane.head == head_dim;
    const T* first = rows[0] + head * (all_heads ? kBlockN * head_dim : plane.head);
    return reinterpret_cast<const char*>(first);
  }

  const KVCache& cache_;
  const T *keys_[kBlockN], *values_[kBlockN];            // the current block's, of head 0
  const T *next_keys_[kBlockN], *next_values_[kBlockN];  // the next block's
  bool next_is_contiguous_ = false;                      // both have contiguous rows
};

}  // namespace
}  // namespace extrope
