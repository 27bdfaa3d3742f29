// Rotates cached keys from their stored position stored(j) to k_map(j).
//
// The difference is u(j) = k_map(j) - stored(j). A block of keys from j0 on rotates by only
// u(j) - u(j0), and the queries by q_map(i) - u(j0). So no angle of a key is ever large, and if u
// grows by equal steps, one small table serves all blocks. If pairs of dims have their own maps,
// every key has its own row, and j0 is not used.
#pragma once

#include <cmath>

#include "cpu/decode/rows.h"
#include "cpu/runtime/buffer.h"
#include "cpu/runtime/pair_angles.h"
#include "cpu/runtime/workspace.h"
#include "cpu/simd/rotate_to_float.h"
#include "cpu/simd/sincos.h"

namespace extrope {
namespace {

class KeyRotation {
 public:
  // The cosines and sines of the block's keys in one head: key n's start at at[n]. Those of keys
  // after the last are anything.
  struct KeyAngles {
    const float *cos, *sin;
    const int64_t* at;
  };

  KeyRotation(const DecodeParams& p, const PositionMap& k_map)
      : rotation_(p.freqs.of_rows(p.cache.head_dim)),
        stored_(p.regions.stored),
        k_map_(k_map),
        pair_maps_(p.regions.pair_maps),
        freq_head_(p.freqs.head()),
        heads_(p.freqs.heads),
        padded_(round_up(p.freqs.half, kFloats)),
        row_size_(heads_ * padded_),
        stride_(round_up(p.cache.head_dim, kFloats)) {
    const double step = is_of_pairs() ? 0 : angle(1) - angle(0);
    step_ = step == 0 ? 1.0 : step;
    // Huge offsets round each place by itself.
    has_equal_steps_ = step != 0 && is_affine(k_map) && is_affine(stored_) &&
                       std::abs(angle(kBlockN) - angle(0) - kBlockN * step) < kSame;
  }

  bool is_of_pairs() const { return k_map_.is_of_pairs() || stored_.is_of_pairs(); }

  // Returns u(j).
  double angle(int64_t j) const { return k_map_(j) - stored_(j); }

  // Computes cosines and sines of the `count` keys from j0 on; returns u(j0), or 0 if it is not
  // used.
  double start_block(const double* inv_freq, int64_t j0, int64_t count) {
    if (inv_freq_ != inv_freq) start_table(inv_freq);
    count_ = count;
    if (has_equal_steps_) return angle(j0);
    std::fill(at_ + count, at_ + kBlockN, 0);  // rows after the last key: any that is filled
    if (!is_of_pairs()) return start_steps(j0);
    for (int64_t n = 0; n < count; ++n) {
      at_[n] = n * row_size_;
      fill(n, 1.0, j0 + n);
    }
    return 0.0;
  }

  // Rotates one head of the block's keys; rows after the last key are anything.
  template <typename T>
  RowPointers<float> rotate(RowPointers<T> keys, int64_t head) {
    const KeyAngles angles = this->angles(head);
    for (int64_t n = 0; n < count_; ++n) {
      rotate_to_float(rotation_, keys.row(n), angles.cos + at_[n], angles.sin + at_[n], 1.0f,
                      &rotated_[n * stride_]);
    }
    return {rows_, 0};
  }

  // True if a key is two halves of whole vectors, which are a pair each: products can rotate it in
  // registers.
  bool is_of_vectors() const {
    const int64_t half = rotation_.half;
    return !rotation_.interleaved && 2 * half == rotation_.dim && half % kFloats == 0;
  }

  KeyAngles angles(int64_t head) const {
    const int64_t first = heads_ > 1 ? head * padded_ : 0;
    return {&cos_[first], &sin_[first], at_};
  }

 private:
  // The allowed distance of an angle from a whole number of steps, in steps: invisible in float32.
  static constexpr double kSame = 1e-8;

  static bool is_affine(const PositionMap& map) {
    return map.modulus == 0 && !map.floor && map.cap == INFINITY && !map.is_of_pairs();
  }

  double start_steps(int64_t j0) {
    const double origin = angle(j0);
    for (int64_t n = 0; n < count_; ++n) {
      const double offset = angle(j0 + n) - origin, steps = offset / step_;
      const double whole = std::nearbyint(steps);
      const bool in_table = whole >= 0 && whole < kBlockN && std::abs(steps - whole) < kSame;
      const int64_t row = in_table ? static_cast<int64_t>(whole) : kBlockN + n;
      at_[n] = row * row_size_;
      if (!in_table) fill(row, offset);
      if (in_table) fill_steps(row + 1);
    }
    return origin;
  }

  // Fills the table up to `count` steps.
  void fill_steps(int64_t count) {
    for (; filled_ < count; ++filled_) fill(filled_, static_cast<double>(filled_) * step_);
  }

  // Once filled, row n of the first kBlockN rows is n steps; other rows belong to single keys.
  void start_table(const double* inv_freq) {
    inv_freq_ = inv_freq;
    filled_ = 0;
    cos_.resize(2 * kBlockN * row_size_);
    sin_.resize(2 * kBlockN * row_size_);
    rotated_.assign(kBlockN * stride_, 0.0f);
    for (int64_t n = 0; n < kBlockN; ++n) rows_[n] = &rotated_[n * stride_], at_[n] = n * row_size_;
    if (has_equal_steps_) fill_steps(kBlockN);
  }

  // Fills a row by u, or by the places of key j if pairs have their own.
  void fill(int64_t row, double u, int64_t j = 0) {
    PairAngles pairs;
    for (int64_t head = 0; head < heads_; ++head) {
      const int64_t at = row * row_size_ + head * padded_;
      const double* inv_freq = inv_freq_ + head * freq_head_;
      if (is_of_pairs()) inv_freq = pairs.fill(pair_maps_, k_map_, stored_, j, inv_freq);
      fill_sincos(inv_freq, rotation_.half, Angles{.position = u}, &cos_[at], &sin_[at]);
    }
  }

  RowRotation rotation_;
  PositionMap stored_, k_map_;
  PairMaps pair_maps_;
  int64_t freq_head_;  // stride of heads' frequencies
  int64_t heads_;      // heads with their own rows of cos and sin; 1: all share them
  int64_t padded_, row_size_, stride_;  // floats of cos in a head, of all its heads, and of a key
  double step_;
  bool has_equal_steps_;  // key n of every block rotates by n steps
  int64_t count_ = 0, filled_ = 0;
  const double* inv_freq_ = nullptr;  // the table's frequencies
  Buffer<float> cos_, sin_, rotated_;
  int64_t at_[kBlockN];
  const float* rows_[kBlockN];
};

}  // namespace
}  // namespace extrope
