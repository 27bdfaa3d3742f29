// Where the rotations of an append write: into the cache itself, or, where that is e4m3, into rows
// of the tokens' own type first.
#pragma once

#include <optional>
#include <vector>

#include "cpu/append/quantize.h"
#include "cpu/append/rotations.h"
#include "cpu/runtime/kept_pages.h"

namespace extrope {

class CacheWrites {
 public:
  CacheWrites(const KVCache& cache, const CacheRows& rows, int64_t batch, int64_t seqlen)
      : cache_(cache), rows_(rows), batch_(batch), seqlen_(seqlen) {}
  CacheWrites(const CacheWrites&) = delete;

  // Where the rotated keys go.
  void take_keys(RopeTensor& x) {
    if (!cache_.is_e4m3()) return write_into(x, cache_.k, rows_.k);
    const int64_t row = cache_.heads * cache_.head_dim;
    staged_.emplace(batch_ * seqlen_ * row * element_bytes(cache_.dtype));
    k_ = {staged_->data(), seqlen_ * row, row, cache_.head_dim};
    x.out = k_.data, x.out_batch = k_.block, x.out_seq = k_.slot, x.out_head = k_.head;
  }

  // Runs the rotations, which take_keys() has been asked for the keys of, and writes the values.
  void run(Rotations& all, const Plane& v) const {
    if (!cache_.is_e4m3()) {
      all.add(values_into(cache_, rows_, v, batch_, seqlen_));
      return all.run();
    }
    all.run();
    quantize(k_, cache_.k, cache_.k_scale, cache_.head_dim, rows_.k);
    quantize(v, cache_.v, cache_.v_scale, cache_.head_dim_v, rows_.v);
  }

 private:
  void quantize(const Plane& in, const Plane& out, const float* scale, int64_t head_dim,
                const std::vector<int64_t>& rows) const {
    const QuantizeParams p{.dtype = cache_.dtype,
                           .in = in,
                           .seqlen = seqlen_,
                           .heads = cache_.heads,
                           .head_dim = head_dim,
                           .scale = scale,
                           .out = static_cast<uint8_t*>(out.data),
                           .out_head = out.head,
                           .out_rows = rows.data()};
#define EXTROPE_QUANTIZE(isa) quantize_rows_##isa
    share_out(batch_ * seqlen_, cache_.heads * head_dim * 4,
              [&](int64_t begin, int64_t end) { EXTROPE_WIDEST(EXTROPE_QUANTIZE)(p, begin, end); });
#undef EXTROPE_QUANTIZE
  }

  const KVCache& cache_;
  const CacheRows& rows_;
  const int64_t batch_, seqlen_;
  Plane k_{};
  std::optional<Memory> staged_;
};

}  // namespace extrope
