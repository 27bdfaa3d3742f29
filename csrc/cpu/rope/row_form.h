// The forms of rows that have kernels of their own: by the number of pairs, and by how results are
// written.
#pragma once

#include "common/rope_params.h"
#include "cpu/rope/pairs.h"
#include "cpu/runtime/caches.h"

namespace extrope {
namespace {

// True if a vector of results is a whole cache line.
template <typename T>
constexpr bool kCanStream = kFloats == 16 && (std::is_same_v<T, float> || std::is_same_v<T, bf16>);

// Returns true to write a result by streaming stores: few of its rows would still be cached when
// they are read, and whole lines need no read before a write.
template <typename T>
bool streams_output(const RopeParams& p, const RopeTensor& x) {
  constexpr int64_t kLine = 64 / sizeof(T);
  const int64_t heads = p.tensors[0].heads + p.tensors[1].heads;
  return kCanStream<T> && x.out != x.in && !x.out_rows &&
         reinterpret_cast<uintptr_t>(x.out) % 64 == 0 &&
         (x.out_batch | x.out_seq | x.out_head) % kLine == 0 &&
         p.batch * p.seqlen * heads * p.head_dim * int64_t{sizeof(T)} > kMostCached;
}

template <typename T>
bool streams_any_output(const RopeParams& p) {
  return streams_output<T>(p, p.tensors[0]) || streams_output<T>(p, p.tensors[1]);
}

// The form of a tensor's rows: Half pairs, which are all dims; or any number of pairs if Half is 0.
// Streaming: they are written by streaming stores.
template <int64_t Half, bool Streaming>
struct RowForm {
  static constexpr int64_t kHalf = Half;
  static constexpr bool kStreams = Streaming;
};

// Calls visit(RowForm()) for a tensor. Half is set only for the most common rows, and only if
// registers can hold a value per pair.
template <typename T, typename Visit>
auto with_row_form(const RopeParams& p, const RopeTensor& x, const Visit& visit) {
  if constexpr (kFloats == 16 && sizeof(T) <= sizeof(float)) {
    const int64_t dims = p.rotary_dim == p.head_dim ? p.head_dim : 0;
    if constexpr (kCanStream<T>) {
      const bool streams = streams_output<T>(p, x);
      if (streams && dims == 64) return visit(RowForm<32, true>());
      if (streams && dims == 128) return visit(RowForm<64, true>());
    }
    if (dims == 64) return visit(RowForm<32, false>());
    if (dims == 128) return visit(RowForm<64, false>());
  }
  return visit(RowForm<0, false>());
}

}  // namespace
}  // namespace extrope
