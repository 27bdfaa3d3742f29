// The write of new keys and values into a cache, for rope_append_kvcache and for
// rope_attention_with_kvcache(k=, v=).
//
// Keys are rotated straight into the cache, and values copied beside them, in one pass
// over the tokens. For a cache in e4m3 the rotated keys first go to memory of their own type; then
// keys and values are quantized.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "common/regions.h"
#include "cpu/cache/quantize.h"
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
  x.decay_sign = -1.0;  // of keys
  return p;
}

// One append: the rotation of its tokens, or copies of them, and their rows in the cache. First
// keys are added; run() then does everything.
class Append {
 public:
  Append(const KVCache& cache, CacheRows rows, int64_t batch, int64_t seqlen)
      : cache_(cache), rows_(std::move(rows)), batch_(batch), seqlen_(seqlen) {
    copies_.reserve(2);
  }
  Append(const Append&) = delete;

  // Makes the cache the output of new keys.
  void write_keys(RopeTensor& keys) {
    if (!cache_.is_e4m3()) return write_into(keys, cache_.k, rows_.k);
    const int64_t row = cache_.heads * cache_.head_dim;
    staged_.emplace(batch_ * seqlen_ * row * element_bytes(cache_.dtype));
    staged_k_ = {staged_->data(), seqlen_ * row, row, cache_.head_dim};
    keys.out = staged_k_.data;
    keys.out_batch = staged_k_.block, keys.out_seq = staged_k_.slot, keys.out_head = staged_k_.head;
  }

  // Sets a position per token.
  void set_positions(RopeParams& p, std::vector<double> positions) {
    positions_ = std::move(positions);
    p.positions = positions_.data();
    p.position_type = PositionType::f64;
    p.positions_are_offsets = false;
    p.position_batch = p.seqlen, p.position_seq = 1;
  }

  // Adds the rotation of k, or of q and k together, or a copy.
  void add(const RopeParams& p) {
    bytes_ += bytes_of_token(p);
    if (p.rotary_dim > 0) {
      rotation_ = p;
    } else {
      copies_.push_back({p.tensors[0], p.head_dim, element_bytes(p.dtype)});
    }
  }

  // Adds raw keys of tokens at these positions, which go where `stored` maps them.
  void add_keys(RopeParams keys, const PositionMap& stored, const std::vector<int64_t>& positions) {
    write_keys(keys.tensors[0]);
    if (keys.rotary_dim > 0) {
      std::vector<double> places(positions.size());
      for (size_t n = 0; n < places.size(); ++n) places[n] = stored(positions[n]);
      set_positions(keys, std::move(places));
    }
    add(keys);
  }

  // Raises if rows that are written share memory with `from`, rows of the same tokens: some threads
  // would read what others have written.
  void refuse_overlap(const char* op, const char* name, const Plane& from, int64_t heads,
                      int64_t head_dim) const {
    const PlaneRows source{from, heads, head_dim, element_bytes(cache_.dtype)};
    const int64_t cached = cache_.is_e4m3() ? 1 : element_bytes(cache_.dtype);
    const auto refuse = [&](const char* in, const Plane& plane, int64_t dim,
                            const std::vector<int64_t>& rows) {
      if (!overlaps(source, {plane, cache_.heads, dim, cached}, rows)) return;
      throw std::runtime_error(std::string(op) + ": " + name + " must not share memory with " + in +
                               "'s slots for the new tokens");
    };
    refuse("k_cache", cache_.k, cache_.head_dim, rows_.k);
    refuse("v_cache", cache_.v, cache_.head_dim_v, rows_.v);
  }

  // Rotates, and writes keys and values.
  void run(const Plane& v) {
    const int64_t tokens = batch_ * seqlen_;
    if (tokens == 0) return;
    if (!cache_.is_e4m3()) {
      RopeParams values =
          unrotated(cache_.dtype, v, batch_, seqlen_, cache_.heads, cache_.head_dim_v);
      write_into(values.tensors[0], cache_.v, rows_.v);
      add(values);
    }
#define EXTROPE_ROPE(isa) rope_tokens_##isa
    if (rotation_) rotation_->copied = copies_.data(), rotation_->num_copied = copies_.size();
    share_out(tokens, bytes_, [&](int64_t begin, int64_t end) {
      if (rotation_) return EXTROPE_WIDEST(EXTROPE_ROPE)(*rotation_, begin, end);
      for (int64_t n = begin; n < end; ++n) {
        for (const CopiedRows& rows : copies_) copy_token(rows, n / seqlen_, n % seqlen_, n);
      }
    });
#undef EXTROPE_ROPE
    if (!cache_.is_e4m3()) return;
    quantize(staged_k_, cache_.k, cache_.k_scale, cache_.head_dim, rows_.k);
    quantize(v, cache_.v, cache_.v_scale, cache_.head_dim_v, rows_.v);
  }

 private:
  // All heads of some rows, and the bytes of an element.
  struct PlaneRows {
    Plane plane;
    int64_t heads, head_dim, element;

    // Returns the bytes of one head, for a row that starts at this element.
    std::pair<const char*, const char*> bytes(int64_t row, int64_t head) const {
      const char* begin =
          static_cast<const char*>(plane.data) + (row + head * plane.head) * element;
      return {begin, begin + head_dim * element};
    }
    // Returns the bytes from the first of these rows to the last.
    std::pair<const char*, const char*> span(int64_t first_row, int64_t last_row) const {
      return {bytes(first_row, 0).first, bytes(last_row, heads - 1).second};
    }
  };

  static void write_into(RopeTensor& x, const Plane& cache, const std::vector<int64_t>& rows) {
    x.out = cache.data, x.out_head = cache.head, x.out_rows = rows.data();
  }

  bool overlaps(const PlaneRows& source, const PlaneRows& cache,
                const std::vector<int64_t>& rows) const {
    int64_t least = INT64_MAX, most = -1;
    for (const int64_t row : rows) {
      if (row >= 0) least = std::min(least, row), most = std::max(most, row);
    }
    if (most < 0 || source.heads == 0) return false;
    const int64_t last = (batch_ - 1) * source.plane.block + (seqlen_ - 1) * source.plane.slot;
    const auto read = source.span(0, last), written = cache.span(least, most);
    if (read.second <= written.first || written.second <= read.first) return false;
    // Only views of the cache come here. All pieces of the source are of one length: sorted by
    // their ends, they are sorted by their beginnings too.
    const int64_t bytes = source.head_dim * source.element;
    std::vector<const char*> ends;
    for (int64_t n = 0; n < batch_ * seqlen_; ++n) {
      const int64_t row = n / seqlen_ * source.plane.block + n % seqlen_ * source.plane.slot;
      for (int64_t h = 0; h < source.heads; ++h) ends.push_back(source.bytes(row, h).second);
    }
    std::sort(ends.begin(), ends.end());
    for (const int64_t row : rows) {
      for (int64_t h = 0; row >= 0 && h < cache.heads; ++h) {
        const auto [begin, end] = cache.bytes(row, h);
        const auto next = std::upper_bound(ends.begin(), ends.end(), begin);
        if (next != ends.end() && *next - bytes < end) return true;
      }
    }
    return false;
  }

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
  const CacheRows rows_;
  const int64_t batch_, seqlen_;
  int64_t bytes_ = 0;  // of a token, to share out the work
  std::optional<RopeParams> rotation_;
  std::vector<CopiedRows> copies_;  // beside the rotation, or alone
  std::vector<double> positions_;   // of the rotation
  std::optional<Memory> staged_;    // rotated keys, for a cache in e4m3
  Plane staged_k_{};
};

}  // namespace extrope
