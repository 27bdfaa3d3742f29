// New keys and values into a key/value cache. Compiled once for each instruction set, with
// EXTROPE_ISA as its name.

#include <cstring>

#include "cpu/decode/kernels.h"
#include "cpu/decode/types.h"
#include "cpu/runtime/scratch.h"
#include "cpu/runtime/workspace.h"
#include "cpu/simd/rotate_row.h"
#include "cpu/simd/sincos.h"

namespace extrope {
namespace {

template <typename T>
T* row_of(const Plane& plane, int64_t block, int64_t slot, int64_t head) {
  return static_cast<T*>(plane.data) + block * plane.block + slot * plane.slot + head * plane.head;
}

template <typename T>
void append_tokens(const AppendParams& p, int64_t begin, int64_t end) {
  const KVCache& cache = p.cache;
  const RowRotation rotation{cache.head_dim, p.freqs.half, p.freqs.interleaved};
  const bool raw = p.stored.is_constant() && p.stored(0) == 0;
  const int64_t bytes = cache.head_dim * sizeof(T), bytes_v = cache.head_dim_v * sizeof(T);
  const int64_t padded = round_up(p.freqs.half, kFloats);
  Buffer<float> cos(padded), sin(padded), rotated(round_up(cache.head_dim, kFloats));
  int64_t batch = 0;
  for (int64_t n = begin; n < end; ++n) {
    int64_t token = n, first = 0;  // of k and v: their token, and the sequence's first one
    if (cache.cu_new) {
      while (n >= cache.cu_new[batch + 1]) ++batch;
      first = cache.cu_new[batch];
    } else {
      batch = n / cache.appended, token = n % cache.appended;
    }
    const int64_t slot = cache.seqlens[batch] + token - first;
    int64_t block = batch, in_block = slot;
    if (cache.block_table) {
      block = cache.block_table[batch * cache.table_batch + slot / cache.page_size];
      in_block = slot % cache.page_size;
    }
    if (!raw) {
      const double position = p.stored(slot - cache.first_slot(batch));
      const Angles angles{position, 1.0, -position, p.freqs.log_decay, false};
      fill_sincos(p.freqs.inv_freq + batch * p.freqs.batch, p.freqs.half, angles, cos.data(),
                  sin.data());
    }
    for (int64_t head = 0; head < cache.heads; ++head) {
      const T* k = row_of<T>(p.k, batch, token, head);
      T* k_out = row_of<T>(cache.k, block, in_block, head);
      if (raw) {
        std::memcpy(k_out, k, bytes);
      } else {
        rotate_row(rotation, k, cos.data(), sin.data(), 1.0f, rotated.data());
        narrow_row(rotated.data(), cache.head_dim, k_out);
      }
      std::memcpy(row_of<T>(cache.v, block, in_block, head), row_of<T>(p.v, batch, token, head),
                  bytes_v);
    }
  }
}

}  // namespace

void EXTROPE_EXPAND(append_tokens_, EXTROPE_ISA)(const AppendParams& p, int64_t begin,
                                                 int64_t end) {
  with_type(p.cache.dtype, [&](auto type) { append_tokens<decltype(type)>(p, begin, end); });
}

}  // namespace extrope
