// The rotations of an append and their outputs: the cache itself, or, if that is e4m3, first rows
// in the tokens' type.
#pragma once

#include <optional>
#include <vector>

#include "common/regions.h"
#include "cpu/append/quantize.h"
#include "cpu/rope/copied_rows.h"
#include "cpu/rope/kernel.h"
#include "cpu/runtime/capability.h"
#include "cpu/runtime/kept_pages.h"
#include "cpu/runtime/threads.h"

namespace extrope {

// Returns params that copy rows, until frequencies are set.
inline RopeParams unrotated(DType dtype, const Plane& in, int64_t batch, int64_t seqlen,
                            int64_t heads, int64_t head_dim) {
  RopeParams p{};
  p.dtype = dtype;
  p.batch = batch, p.seqlen = seqlen, p.head_dim = head_dim;
  p.num_tensors = 1, p.angle_heads = 1;
  p.amplitude = 1.0;
  RopeTensor& x = p.tensors[0];
  x.in = in.data, x.heads = heads;
  x.in_batch = in.block, x.in_seq = in.slot, x.in_head = in.head;
  x.decay_sign = -1.0;
  return p;
}

inline void write_into(RopeTensor& x, const Plane& cache, const std::vector<int64_t>& rows) {
  x.out = cache.data, x.out_head = cache.head, x.out_rows = rows.data();
}

inline RopeParams values_into(const KVCache& cache, const CacheRows& rows, const Plane& v,
                              int64_t batch, int64_t seqlen) {
  RopeParams p = unrotated(cache.dtype, v, batch, seqlen, cache.heads, cache.head_dim_v);
  write_into(p.tensors[0], cache.v, rows.v);
  return p;
}

// Returns positions by token; tokens after the last sequence continue its positions.
inline std::vector<int64_t> positions_behind(const KVCache& cache, int64_t tokens) {
  std::vector<int64_t> positions(tokens);
  for (int64_t b = 0; b < cache.batch; ++b) {
    const int64_t first = cache.first_new(b), start = cache.seqlens[b] - cache.first_slot(b);
    const int64_t end = b + 1 < cache.batch ? first + cache.new_tokens(b) : tokens;
    for (int64_t n = first; n < end; ++n) positions[n] = start + n - first;
  }
  return positions;
}

template <typename Number>
inline void set_token_positions(RopeParams& p, const std::vector<Number>& positions) {
  p.positions = positions.data();
  p.position_type = std::is_same_v<Number, double> ? PositionType::f64 : PositionType::i64;
  p.positions_are_offsets = false;
  p.position_batch = p.seqlen, p.position_seq = 1;
}

inline std::vector<double> mapped(const PositionMap& map, const std::vector<int64_t>& positions) {
  std::vector<double> out(positions.size());
  for (size_t n = 0; n < out.size(); ++n) out[n] = map(positions[n]);
  return out;
}

// Returns true if keys stay at position 0 and need no rotation.
inline bool is_raw(const PositionMap& stored) { return stored.is_constant() && stored(0) == 0; }

// Rotations of q and k, together or one after the other, and copies of v, for the same tokens in
// each thread. Tensors that need neither rotation nor norm are copied beside the first that does.
class Rotations {
 public:
  void add(const RopeParams& p) {
    RopeNormParams part{};
    static_cast<RopeParams&>(part) = p;
    add(part);
  }
  void add(const RopeNormParams& p) {
    seqlen_ = p.seqlen, tokens_ = p.batch * p.seqlen, bytes_ += bytes_of_token(p);
    if (p.rotary_dim > 0 || p.num_tensors > 1 || p.norms[0].weight) {
      parts_[count_++] = p;
    } else {
      copies_[num_copies_++] = {p.tensors[0], p.head_dim, element_bytes(p.dtype)};
    }
  }

  void run() {
    if (tokens_ == 0) return;
    parts_[0].copied = copies_, parts_[0].num_copied = num_copies_;
    share_out(tokens_, bytes_, [&](int64_t begin, int64_t end) {
      if (count_ == 0) copy(begin, end);
      for (int n = 0; n < count_; ++n) run_part(parts_[n], begin, end);
    });
  }

 private:
#define EXTROPE_ROPE(isa) rope_tokens_##isa
#define EXTROPE_ROPE_NORM(isa) rope_norm_##isa
  static void run_part(const RopeNormParams& p, int64_t begin, int64_t end) {
    if (p.norms[0].weight || p.norms[1].weight) {
      EXTROPE_WIDEST(EXTROPE_ROPE_NORM)(p, begin, end);
    } else {
      EXTROPE_WIDEST(EXTROPE_ROPE)(p, begin, end);
    }
  }
#undef EXTROPE_ROPE
#undef EXTROPE_ROPE_NORM

  void copy(int64_t begin, int64_t end) const {
    for (int64_t t = begin; t < end; ++t) {
      for (int n = 0; n < num_copies_; ++n) copy_token(copies_[n], t / seqlen_, t % seqlen_, t);
    }
  }

  RopeNormParams parts_[3]{};
  CopiedRows copies_[3];
  int count_ = 0, num_copies_ = 0;
  int64_t seqlen_ = 0, tokens_ = 0, bytes_ = 0;
};

class CacheWrites {
 public:
  CacheWrites(const KVCache& cache, const CacheRows& rows, int64_t batch, int64_t seqlen)
      : cache_(cache), rows_(rows), batch_(batch), seqlen_(seqlen) {}
  CacheWrites(const CacheWrites&) = delete;

  // Sets the output of the rotated keys.
  void take_keys(RopeTensor& x) {
    if (!cache_.is_e4m3()) return write_into(x, cache_.k, rows_.k);
    const int64_t row = cache_.heads * cache_.head_dim;
    staged_.emplace(batch_ * seqlen_ * row * element_bytes(cache_.dtype));
    k_ = {staged_->data(), seqlen_ * row, row, cache_.head_dim};
    x.out = k_.data, x.out_batch = k_.block, x.out_seq = k_.slot, x.out_head = k_.head;
  }

  // Runs the rotations, whose keys take_keys() has set up, and writes the values.
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
