// Where a block of keys and values lies, and how the one behind it is on its way meanwhile.
#pragma once

#include <algorithm>

#include "cpu/decode/params.h"
#include "cpu/simd/simd.h"

namespace extrope {
namespace {

constexpr int kBlockN = 32;         // keys of a block: few, so that its heads are read on soon
constexpr int64_t kLineBytes = 64;  // of a processor's caches

// Row n of one head starts at at[n] + offset.
template <typename T>
struct Rows {
  const T* const* at;
  int64_t offset;

  EXTROPE_INLINE const T* row(int64_t n) const { return at[n] + offset; }
  EXTROPE_INLINE const char* bytes(int64_t n) const {
    return reinterpret_cast<const char*>(row(n));
  }
};

// Where the block of keys or values that begins at key `from` lies in the cache: rows[0] to
// rows[kBlockN - 1], those past key end - 1 the last one again.
template <typename T>
void find_rows(const KVCache& cache, const Plane& plane, const QueryBlock& queries, int64_t from,
               int64_t end, const T** rows) {
  const int64_t count = std::min<int64_t>(kBlockN, end - from);
  const T* base = static_cast<const T*>(plane.data);
  int64_t slot = queries.first_slot + from, in_page = slot, size = slot + count;
  const int32_t* page = nullptr;
  if (cache.block_table) {
    size = cache.page_size;
    page = cache.block_table + queries.sequence * cache.table_batch + slot / size;
    in_page = slot % size;
  }
  int64_t block = page ? *page : queries.sequence;
  for (int64_t n = 0; n < count; ++n, ++in_page) {
    if (in_page == size) block = *++page, in_page = 0;
    rows[n] = base + block * plane.block + in_page * plane.slot;
  }
  std::fill(rows + count, rows + kBlockN, rows[count - 1]);
}

// Asks for the lines of so many bytes, into the caches from that level on; returns what is behind.
template <int level>
EXTROPE_INLINE const char* fetch(const char* from, int64_t bytes) {
  for (const char* end = from + bytes; from < end; from += kLineBytes) {
    __builtin_prefetch(from, 0, 4 - level);
  }
  return from;
}

// What comes next, asked for bit by bit during the work on a head of a block: memory answers while
// the core computes, and a core has no more than a dozen or so lines asked for at once.
//
// The head's own values and the next head's keys are wanted at once, in the first-level cache. Of
// the next block, this head's keys and values go to the second: one block is as far as memory
// needs, and too far for the first. Half of those values in whole lines, at most, waits
// for the sums over values, which take too little time for more. Where the next block's
// rows are not one behind the other, as in scattered pages of a few, nothing of it is.
template <typename T>
struct Ahead {
  Rows<T> values{}, next_keys{};  // none where `at` is nullptr
  const char *far_keys = nullptr, *far_values = nullptr;
  int64_t key_bytes = 0, value_bytes = 0;  // of a row
  // Of a far row: of a key and a value with its score, of a value with its sum.
  int64_t far_key_bytes = 0, far_value_bytes = 0, with_sum = 0;

  // With the scores of `count` keys from j on.
  EXTROPE_INLINE void fetch_at_scores(int64_t j, int count) {
    if (!values.at) return;
    for (int k = 0; k < count; ++k) fetch<1>(values.bytes(j + k), value_bytes);
    far_keys = fetch<2>(far_keys, count * far_key_bytes);
    far_values = fetch<2>(far_values, count * far_value_bytes);
  }

  // With the sum over value j.
  EXTROPE_INLINE void fetch_at_value(int64_t j) {
    if (!values.at) return;
    fetch<1>(next_keys.bytes(j), key_bytes);
    far_values = fetch<2>(far_values, with_sum);
  }
};

}  // namespace
}  // namespace extrope
