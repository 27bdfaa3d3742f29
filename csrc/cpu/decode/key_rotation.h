// Cached keys on their way from stored(j), where they lie, to k_map(j).
//
// They rotate on by u(j) = k_map(j) - stored(j). A block of keys from j0 on rotates by
// u(j) - u(j0) alone, and the queries by q_map(i) - u(j0): no angle of a key is ever large, and
// where u grows by equal steps, one small table serves all blocks. Where pairs of dims have maps of
// their own, every key has a row of its own, and j0 is left out.
#pragma once

#include <cmath>

#include "cpu/decode/tile.h"
#include "cpu/runtime/buffer.h"
#include "cpu/runtime/workspace.h"
#include "cpu/simd/pair_angles.h"
#include "cpu/simd/rotate_to_float.h"
#include "cpu/simd/sincos.h"

namespace extrope {
namespace {

class KeyRotation {
 public:
  KeyRotation(const DecodeParams& p, const PositionMap& k_map)
      : rotation_{p.cache.head_dim, p.freqs.half, p.freqs.interleaved},
        stored_(p.regions.stored),
        k_map_(k_map),
        pair_maps_(p.regions.pair_maps),
        freq_head_(p.freqs.head()),
        heads_(std::max(p.heads_of(k_map), p.heads_of(stored_))),
        padded_(round_up(p.freqs.half, kFloats)),
        stride_(round_up(p.cache.head_dim, kFloats)) {
    const double step = is_of_pairs() ? 0 : angle(1) - angle(0);
    step_ = step == 0 ? 1.0 : step;
  }

  bool is_of_pairs() const { return k_map_.is_of_pairs() || stored_.is_of_pairs(); }

  // u(j)
  double angle(int64_t j) const { return k_map_(j) - stored_(j); }

  // Makes the cosines and sines of the `count` keys from j0 on; returns u(j0), or 0 where that is
  // left out.
  double start_block(const double* inv_freq, int64_t j0, int64_t count) {
    if (inv_freq_ != inv_freq) start_table(inv_freq);
    count_ = count;
    for (int64_t n = 0; n < kBlockN; ++n) rows_[n] = &rotated_[std::min(n, count - 1) * stride_];
    if (!is_of_pairs()) return start_steps(j0);
    for (int64_t n = 0; n < count; ++n) {
      at_[n] = n;
      fill(n, 1.0, j0 + n);
    }
    return 0.0;
  }

  // One head of the block's keys; the last one stands in for those behind it.
  template <typename T>
  Rows<float> rotate(Rows<T> keys, int64_t head) {
    for (int64_t n = 0; n < count_; ++n) {
      const int64_t at = (at_[n] * heads_ + (heads_ > 1 ? head : 0)) * padded_;
      rotate_to_float(rotation_, keys.row(n), &cos_[at], &sin_[at], 1.0f, &rotated_[n * stride_]);
    }
    return {rows_, 0};
  }

 private:
  // How far from a whole number of steps an angle may be, in steps: far below what float32 shows.
  static constexpr double kSame = 1e-8;

  double start_steps(int64_t j0) {
    const double origin = angle(j0);
    for (int64_t n = 0; n < count_; ++n) {
      const double offset = angle(j0 + n) - origin, steps = offset / step_;
      const double whole = std::nearbyint(steps);
      const bool in_table = whole >= 0 && whole < kBlockN && std::abs(steps - whole) < kSame;
      at_[n] = in_table ? static_cast<int64_t>(whole) : kBlockN + n;
      if (!in_table) fill(at_[n], offset);
      for (; in_table && filled_ <= at_[n]; ++filled_) {
        fill(filled_, static_cast<double>(filled_) * step_);
      }
    }
    return origin;
  }

  // Of the first kBlockN rows, row n is n steps, once it is filled; the others are single keys'
  // own.
  void start_table(const double* inv_freq) {
    inv_freq_ = inv_freq;
    filled_ = 0;
    cos_.resize(2 * kBlockN * heads_ * padded_);
    sin_.resize(2 * kBlockN * heads_ * padded_);
    rotated_.resize(kBlockN * stride_);
  }

  // By u, or where pairs have places of their own by those of key j.
  void fill(int64_t row, double u, int64_t j = 0) {
    PairAngles pairs;
    for (int64_t head = 0; head < heads_; ++head) {
      const int64_t at = (row * heads_ + head) * padded_;
      const double* inv_freq = inv_freq_ + head * freq_head_;
      if (is_of_pairs()) inv_freq = pairs.fill(pair_maps_, k_map_, stored_, head, j, inv_freq);
      fill_sincos(inv_freq, rotation_.half, Angles{.position = u}, &cos_[at], &sin_[at]);
    }
  }

  RowRotation rotation_;
  PositionMap stored_, k_map_;
  PairMaps pair_maps_;
  int64_t freq_head_;        // from one head's frequencies to the next
  int64_t heads_;            // with rows of cos and sin of their own; 1: all share them
  int64_t padded_, stride_;  // of a row of cos and sin, and of a key
  double step_;
  int64_t count_ = 0, filled_ = 0;
  const double* inv_freq_ = nullptr;  // that the table is for
  Buffer<float> cos_, sin_, rotated_;
  int64_t at_[kBlockN];
  const float* rows_[kBlockN];
};

}  // namespace
}  // namespace extrope
