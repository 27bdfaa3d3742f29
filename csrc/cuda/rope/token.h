// The rotation of one pair of dims at one token: position, exact angle, sine, cosine and
// amplitude.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/rope_params.h"

namespace extrope {

// -------------------------------------------------------------------------------------------------
// Tokens: the places of their dims, their sequences, their positions

struct DeviceToken {
  int batch, seq;   // indices of its dims
  int sequence;     // the packed sequence, else the batch index
  double position;  // on the first axis
};

__device__ inline double load_position(const TokenParams& p, int64_t index) {
  switch (p.position_type) {
    case PositionType::i32:
      return static_cast<double>(static_cast<const int32_t*>(p.positions)[index]);
    case PositionType::i64:
      return static_cast<double>(static_cast<const int64_t*>(p.positions)[index]);
    case PositionType::f32:
      return static_cast<double>(static_cast<const float*>(p.positions)[index]);
    default:
      return static_cast<double>(static_cast<const double*>(p.positions)[index]);
  }
}

// Returns the last sequence that starts at or before `token`; an existing one for any contents of
// cu_seqlens.
__device__ inline int find_sequence(const TokenParams& p, int token) {
  int low = 0, high = static_cast<int>(p.num_sequences);
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    if (p.cu_seqlens[middle] <= token) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Returns token `index` of batch * seqlen tokens, which the launcher keeps within an int: a 64-bit
// division would cost a call.
__device__ inline DeviceToken find_token(const TokenParams& p, int index) {
  DeviceToken token;
  token.batch = p.batch == 1 ? 0 : index / static_cast<int>(p.seqlen);
  token.seq = index - token.batch * static_cast<int>(p.seqlen);
  token.sequence = token.batch;
  int64_t place = token.seq;
  if (p.cu_seqlens != nullptr) {
    token.sequence = find_sequence(p, index);
    place -= p.cu_seqlens[token.sequence];
  }
  token.position = static_cast<double>(p.offset);
  if (p.positions == nullptr) {
    token.position += static_cast<double>(place);
  } else if (p.positions_are_offsets) {
    token.position +=
        static_cast<double>(place) + load_position(p, token.sequence * p.position_batch);
  } else {
    token.position += load_position(p, token.batch * p.position_batch + token.seq * p.position_seq);
  }
  return token;
}

// -------------------------------------------------------------------------------------------------
// Angles

constexpr double TWO_OVER_PI = 0.6366197723675814;
constexpr double PI_OVER_TWO = 1.5707963267948966;
constexpr double PI_OVER_TWO_REST = 6.123233995736766e-17;  // pi/2 minus the constant above
constexpr double LOG2_E = 1.4426950408889634;
constexpr double ROUND_TO_INTEGER =
    6755399441055744.0;  // 1.5 * 2^52: adding it leaves the integer in the low bits

__device__ inline uint64_t bits_of(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

// Subtracts the nearest multiple of pi/2 from the angle; *quadrant counts those multiples modulo 4.
// Each fma rounds once, so only the last bit of the result is lost while angle * 2/pi is below
// 2^51.
__device__ inline double reduce_angle(double angle, unsigned* quadrant) {
  const double shifted = fma(angle, TWO_OVER_PI, ROUND_TO_INTEGER);
  const double quarters = shifted - ROUND_TO_INTEGER;
  *quadrant = static_cast<unsigned>(bits_of(shifted)) & 3u;
  return fma(-quarters, PI_OVER_TWO_REST, fma(-quarters, PI_OVER_TWO, angle));
}

// Minimax polynomials over |r| <= pi/4, within one unit in the last place of float.
__device__ inline void sin_cos_reduced(double reduced, float* sine, float* cosine) {
  const float r = static_cast<float>(reduced);
  const float z = r * r;
  *sine = fmaf(r * z, fmaf(z, fmaf(z, -1.9515295891e-4f, 8.3321608736e-3f), -1.6666654611e-1f), r);
  *cosine = fmaf(
      z * z, fmaf(z, fmaf(z, 2.443315711809948e-5f, -1.388731625493765e-3f), 4.166664568298827e-2f),
      fmaf(z, -0.5f, 1.0f));
}

// Taylor series: over |r| <= pi/4 the first term left out is below 2^-58 of the result. The
// library's sincos would keep a stack frame for angles that cannot occur here.
__device__ inline void sin_cos_reduced(double r, double* sine, double* cosine) {
  const double z = r * r;
  double s = 1.0 / 355687428096000.0;  // 1/17!
  s = fma(s, z, -1.0 / 1307674368000.0);
  s = fma(s, z, 1.0 / 6227020800.0);
  s = fma(s, z, -1.0 / 39916800.0);
  s = fma(s, z, 1.0 / 362880.0);
  s = fma(s, z, -1.0 / 5040.0);
  s = fma(s, z, 1.0 / 120.0);
  s = fma(s, z, -1.0 / 6.0);
  double c = 1.0 / 20922789888000.0;  // 1/16!
  c = fma(c, z, -1.0 / 87178291200.0);
  c = fma(c, z, 1.0 / 479001600.0);
  c = fma(c, z, -1.0 / 3628800.0);
  c = fma(c, z, 1.0 / 40320.0);
  c = fma(c, z, -1.0 / 720.0);
  c = fma(c, z, 1.0 / 24.0);
  *sine = fma(r * z, s, r);
  *cosine = fma(z * z, c, fma(z, -0.5, 1.0));
}

template <typename Acc>
__device__ inline void sin_cos(double angle, Acc* sine, Acc* cosine) {
  unsigned quadrant;
  Acc s, c;
  sin_cos_reduced(reduce_angle(angle, &quadrant), &s, &c);
  const Acc swapped_sine = quadrant & 1 ? c : s;
  const Acc swapped_cosine = quadrant & 1 ? s : c;
  *sine = quadrant & 2 ? -swapped_sine : swapped_sine;
  *cosine = (quadrant + 1) & 2 ? -swapped_cosine : swapped_cosine;
}

// Computes exp in a precision for Acc. The float version gives exp2f a remainder of at most a half
// and computes the power of two itself: so it is as accurate at e^80 as at 1.
__device__ inline double exponential(double x, float) {
  const double clamped = fmin(fmax(x * LOG2_E, -1000.0), 1000.0);
  const double shifted = clamped + ROUND_TO_INTEGER;
  const double fraction = clamped - (shifted - ROUND_TO_INTEGER);
  const uint64_t exponent = (bits_of(shifted) + 1023) << 52;
  double power;
  std::memcpy(&power, &exponent, sizeof(power));
  return power * exp2f(static_cast<float>(fraction));
}

__device__ inline double exponential(double x, double) { return exp(x); }

// Returns the position on the axis of pair `pair`; an existing axis for any contents of axes.
__device__ inline double position_on_axis(const RopeParams& p, const DeviceToken& token, int pair) {
  const int last = static_cast<int>(p.num_axes) - 1, asked = p.axes[pair];
  const int axis = asked < 0 ? 0 : asked > last ? last : asked;
  const int64_t at =
      axis * p.position_axis + token.batch * p.position_batch + token.seq * p.position_seq;
  return static_cast<double>(p.offset) + load_position(p, at);
}

// Computes cosine and sine of pair `pair`, times the amplitude; `conjugate` negates the sine.
template <bool AXES, typename Acc>
__device__ inline void pair_rotation(const RopeParams& p, const DeviceToken& token, int head,
                                     int pair, double decay_sign, Acc* cosine, Acc* sine) {
  const int64_t at = token.sequence * p.freq_batch + head * p.freq_head + pair;
  const double frequency = p.inv_freq_is_f64
                               ? static_cast<const double*>(p.inv_freq)[at]
                               : static_cast<double>(static_cast<const float*>(p.inv_freq)[at]);
  const double position = AXES && p.axes ? position_on_axis(p, token, pair) : token.position;
  Acc s, c;
  sin_cos(position * frequency, &s, &c);
  Acc scale = static_cast<Acc>(p.amplitude);
  if (p.log_decay != nullptr) {
    const double exponent =
        decay_sign * (position - p.decay_origin) * static_cast<double>(p.log_decay[pair]);
    scale = static_cast<Acc>(p.amplitude * exponential(exponent, Acc()));
  }
  *cosine = c * scale;
  *sine = p.conjugate ? -s * scale : s * scale;
}

}  // namespace extrope
