// The distances of prefetches from a row, in the order in which kernels visit rows.
#pragma once

#include <algorithm>

#include "common/rope_params.h"

namespace extrope {
namespace {

constexpr int64_t kBytesReadAhead = 2048, kBytesWrittenAhead = 1024;

// Returns the elements from a row to one about `rows` rows later, by the strides of tokens and
// heads.
inline int64_t distance(int64_t seq_stride, int64_t head_stride, int64_t heads, int64_t rows) {
  heads = std::max<int64_t>(heads, 1);
  // True if other rows lie between the heads of two tokens.
  const bool apart = head_stride < seq_stride && seq_stride != heads * head_stride;
  return apart ? (rows + heads - 1) / heads * seq_stride : rows * std::min(head_stride, seq_stride);
}

// The distances of prefetches from the current row, in elements.
struct PrefetchDistances {
  int64_t in, out, saved;
  int64_t bytes;      // per row
  int64_t rows_read;  // the number of rows in `in`

  PrefetchDistances(const RopeParams& p, const RopeTensor& x, int64_t sizeof_element)
      : bytes(p.head_dim * sizeof_element),
        rows_read(std::max<int64_t>(kBytesReadAhead / bytes, 1)) {
    const int64_t rows_written = std::max<int64_t>(kBytesWrittenAhead / bytes, 1);
    in = distance(x.in_seq, x.in_head, x.heads, rows_read);
    saved = distance(x.saved_seq, x.saved_head, x.heads, rows_read);
    // Slots of a cache are contiguous, except after a page's last one.
    out = x.out_rows ? rows_written * x.out_head
                     : distance(x.out_seq, x.out_head, x.heads, rows_written);
  }

  // Returns the distance past `rows` more rows, which have been read already.
  int64_t in_behind(const RopeTensor& x, int64_t rows) const {
    return distance(x.in_seq, x.in_head, x.heads, rows + rows_read);
  }
};

// Prefetches the cache lines of a later row. The processor itself prefetches only within a page,
// and never lines that are only written.
template <typename T>
inline void prefetch(const T* row, int64_t ahead, int64_t bytes) {
  constexpr int64_t kLine = 64;
  const char* first = reinterpret_cast<const char*>(row + ahead);
  for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(first + i);
}

}  // namespace
}  // namespace extrope
