// Cosine and sine of position * inv_freq for every pair of a token, exact at large positions.
#pragma once

#include <cmath>

#include "cpu/simd/simd.h"

namespace extrope {
namespace {

constexpr double kTwoOverPi = 0.63661977236758134308;
// pi/2 in three parts. The first two have 24 bits: their product with a count of quarter circles
// below 2**29 is exact. position * inv_freq is exact too, so fma contraction cannot change a bit.
constexpr double kHalfPi1 = 0x1.921fb4p+0;
constexpr double kHalfPi2 = 0x1.4442d0p-24;
constexpr double kHalfPi3 = 0x1.8469898cc5170p-48;
// Adding it rounds a double to an integer, and leaves that integer in the low bits.
constexpr double kRound = 0x1.8p52;

// Returns e**x for |x| <= ln(2)/2, by the series up to x**7/7!: relative error below 6e-9.
inline doubles exp_series(doubles x) {
  doubles sum = x * (1.0 / 5040) + 1.0 / 720;
  sum = sum * x + 1.0 / 120;
  sum = sum * x + 1.0 / 24;
  sum = sum * x + 1.0 / 6;
  sum = sum * x + 0.5;
  return (sum * x + 1.0) * x + 1.0;
}

inline doubles exp_wide(doubles x) {
  constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.69314718055994531;
  const doubles shifted = x * kLog2E + kRound;
  const doubles n = shifted - kRound;
  longs exponent = bits_as<longs>(shifted) - bits_as<int64_t>(kRound);
  exponent = exponent > 1023 ? longs{} + 1023 : exponent < -1022 ? longs{} - 1022 : exponent;
  return exp_series(x - n * kLn2) * bits_as<doubles>((exponent + 1023) << 52);
}

struct Reduced {
  doubles remainder;  // at most pi/4
  longs quadrant;     // low two bits
};

inline Reduced reduce(doubles angle) {
  const doubles shifted = angle * kTwoOverPi + kRound;
  const doubles n = shifted - kRound;
  return {((angle - n * kHalfPi1) - n * kHalfPi2) - n * kHalfPi3, bits_as<longs>(shifted)};
}

inline floats sine(floats r, floats z) {
  const floats p = (-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f;
  return r + r * (z * p);
}

inline floats cosine(floats z) {
  const floats p = (2.443315711809948e-5f * z - 1.388731625493765e-3f) * z + 4.166664568298827e-2f;
  return 1.0f - 0.5f * z + z * z * p;
}

// The angles of one token, position * inv_freq[i], and the factors of their cosines and sines,
// amplitude * exp(decay * log_decay[i]).
struct Angles {
  double position;
  double amplitude = 1.0;
  double decay = 0.0;
  const double* log_decay = nullptr;  // nullptr: only the amplitude
  bool conjugate = false;             // rotate by minus the angle
};

// Computes one vector of pairs for tensors that are rotated in float. Angles are reduced in double;
// the rest is in float, which has twice the lanes.
inline void sincos(const double* freq, floats amplitude, const Angles& angles, floats& cos,
                   floats& sin) {
  const Reduced low = reduce(load<doubles>(freq) * angles.position);
  const Reduced high = reduce(load<doubles>(freq + kDoubles) * angles.position);
  const floats r = narrow(low.remainder, high.remainder);
  const ints quadrant = low_halves(low.quadrant, high.quadrant);
  const floats z = r * r, s = sine(r, z), c = cosine(z);
  const ints odd = (quadrant & 1) != 0;
  const ints flip_cos = (quadrant + 1) << 30 & INT32_MIN;
  const ints flip_sin = (quadrant + (angles.conjugate ? 2 : 0)) << 30 & INT32_MIN;
  cos = amplitude * bits_as<floats>(bits_as<ints>(odd ? s : c) ^ flip_cos);
  sin = amplitude * bits_as<floats>(bits_as<ints>(odd ? c : s) ^ flip_sin);
}

// Computes the same in full double precision; libm is exact enough for small angles.
inline void sincos(const double* freq, doubles amplitude, const Angles& angles, doubles& cos,
                   doubles& sin) {
  const Reduced reduced = reduce(load<doubles>(freq) * angles.position);
  for (int i = 0; i < kDoubles; ++i) {
    const double s = std::sin(reduced.remainder[i]), c = std::cos(reduced.remainder[i]);
    const int64_t quadrant = reduced.quadrant[i];
    const double swapped_cos = quadrant & 1 ? s : c, swapped_sin = quadrant & 1 ? c : s;
    cos[i] = amplitude[i] * ((quadrant + 1) & 2 ? -swapped_cos : swapped_cos);
    sin[i] = amplitude[i] * ((quadrant & 2) != 2 * angles.conjugate ? -swapped_sin : swapped_sin);
  }
}

// Returns the amplitudes of one vector of pairs with decay.
inline floats decayed(const Angles& angles, int64_t i, floats) {
  const auto some = [&](int64_t at) {
    return angles.amplitude * exp_wide(load<doubles>(angles.log_decay + at) * angles.decay);
  };
  return narrow(some(i), some(i + kDoubles));
}

inline doubles decayed(const Angles& angles, int64_t i, doubles) {
  doubles exponent = load<doubles>(angles.log_decay + i) * angles.decay;
  for (int lane = 0; lane < kDoubles; ++lane) exponent[lane] = std::exp(exponent[lane]);
  return angles.amplitude * exponent;
}

// Fills cos[i], sin[i] for the `half` pairs of one token. Accesses go up to a whole vector of
// floats: callers pad results and frequencies.
template <typename Wide>
void fill_sincos(const double* inv_freq, int64_t half, const Angles& angles, Wide* cos, Wide* sin) {
  using V = std::conditional_t<std::is_same_v<Wide, float>, floats, doubles>;
  const V steady = V{} + static_cast<Wide>(angles.amplitude);
  for (int64_t i = 0; i < half; i += Lanes<V>::count) {
    V c{}, s{};
    sincos(inv_freq + i, angles.log_decay ? decayed(angles, i, V{}) : steady, angles, c, s);
    store(cos + i, c);
    store(sin + i, s);
  }
}

}  // namespace
}  // namespace extrope
