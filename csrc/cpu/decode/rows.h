// Rows of keys and values in the cache: their places, and how they are read.
#pragma once

#include <algorithm>

#include "cpu/decode/params.h"
#include "cpu/simd/e4m3.h"
#include "cpu/simd/pairs.h"

namespace extrope {
namespace {

constexpr int kBlockN = 32;  // keys per block: few, to come soon to its next heads

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

}  // namespace
}  // namespace extrope
