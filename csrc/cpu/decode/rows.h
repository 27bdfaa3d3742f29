// Rows of keys and values in the cache: their places, how they are read, and the prefetches of the
// next block.
#pragma once

#include <algorithm>

#include "cpu/decode/params.h"
#include "cpu/simd/e4m3.h"
#include "cpu/simd/pairs.h"

namespace extrope {
namespace {

constexpr int kBlockN = 32;         // keys per block: few, to come soon to its next heads
constexpr int64_t kLineBytes = 64;  // in a processor's caches

// The rows of one head: row n starts at at[n] + offset.
template <typename T>
struct RowPointers {
  const T* const* at;
  int64_t offset;

  EXTROPE_INLINE const T* row(int64_t n) const { return at[n] + offset; }
  EXTROPE_INLINE const char* bytes(int64_t n) const {
    return reinterpret_cast<const char*>(row(n));
  }
};

// Loads rows of the cache in the cheapest form; queries and sums over values follow it. bfloat16
// comes in pairs, as 32-bit words, so that no dim has to move: in the order of order_by_words. e4m3
// comes divided by its unit.
template <typename T>
constexpr bool kReadInPairs = std::is_same_v<T, bf16>;
template <typename T>
constexpr float kUnit = std::is_same_v<T, e4m3> ? kUnitE4m3 : 1.0f;

// The number of vectors of a row that are loaded together.
template <typename T>
constexpr int kTogether = kReadInPairs<T> || (kFloats == 16 && std::is_same_v<T, e4m3>) ? 2 : 1;

template <int Count, typename T>
EXTROPE_INLINE void load_dims(const T* from, floats (&x)[Count]) {
  if constexpr (kReadInPairs<T> && Count % 2 == 0) {
    for (int i = 0; i < Count; i += 2) std::tie(x[i], x[i + 1]) = load_pairs(from + i * kFloats);
  } else if constexpr (std::is_same_v<T, e4m3>) {
    load_units(from, x);
  } else {
    load_wide(from, x);
  }
}

// Finds the cache's rows of keys or values from key `from` on: rows[0] to rows[kBlockN - 1]; after
// key end - 1 the last one repeats.
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

}  // namespace
}  // namespace extrope
