// What the cases share: inputs that are the same numbers on every machine, and where results go.
#pragma once

#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#include "common/token_params.h"
#include "cpu/simd/simd.h"

namespace extrope {

// Results that only move values: the same bits are wanted on every machine.
template <typename T>
struct Moved {
  const std::vector<T>& values;
};

// Appends one result to the file: a line of text with its name, type and count, then its bytes.
void write_bytes(const std::string& name, const char* type, const void* data, int64_t count,
                 int64_t size);

void run_conversions();
void run_rope();
void run_permute();
void run_attention();
void run_decode();
void run_linear_attention();

namespace {

template <typename T>
const char* type_name() {
  if (std::is_same_v<T, float>) return "float32";
  if (std::is_same_v<T, double>) return "float64";
  return std::is_same_v<T, bf16> ? "bfloat16" : "float16";
}

template <typename T>
DType dtype() {
  if (std::is_same_v<T, float>) return DType::f32;
  if (std::is_same_v<T, double>) return DType::f64;
  return std::is_same_v<T, bf16> ? DType::bf16 : DType::f16;
}

template <typename T>
void write(const std::string& name, const std::vector<T>& values) {
  write_bytes(name, type_name<T>(), values.data(), static_cast<int64_t>(values.size()), sizeof(T));
}

template <typename T>
void write(const std::string& name, const Moved<T>& moved) {
  constexpr const char* type = sizeof(T) == 2 ? "uint16" : sizeof(T) == 4 ? "uint32" : "uint64";
  const std::vector<T>& values = moved.values;
  write_bytes(name, type, values.data(), static_cast<int64_t>(values.size()), sizeof(T));
}

// Bits of a counter, mixed (splitmix64).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed << 32) {}
  uint64_t bits() {
    uint64_t x = state_ += 0x9e3779b97f4a7c15;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
    x = (x ^ x >> 27) * 0x94d049bb133111eb;
    return x ^ x >> 31;
  }
  // In [-1, 1).
  float number() { return static_cast<float>(static_cast<int64_t>(bits()) >> 40) * 0x1p-23f; }
  int64_t below(int64_t n) { return static_cast<int64_t>(bits() >> 33) % n; }

 private:
  uint64_t state_;
};

template <typename T>
std::vector<T> random_values(int64_t count, uint64_t seed) {
  Random random(seed);
  std::vector<T> values(count);
  for (T& x : values) {
    if constexpr (std::is_same_v<T, double>) {
      x = random.number();
    } else {
      narrow(random.number(), x);
    }
  }
  return values;
}

// `half` frequencies from 1 down, by products alone: libm's pow is not the same everywhere. Padded
// with zeros to whole vectors.
inline std::vector<double> frequencies(int64_t half, int64_t padded) {
  std::vector<double> out(padded);
  double frequency = 1.0;
  for (int64_t i = 0; i < half; ++i, frequency *= 0.8125) out[i] = static_cast<float>(frequency);
  return out;
}

// Calls run(zero, name) for each type of elements that every kernel takes.
template <typename Run>
void each_type(const Run& run) {
  run(float{}, "float32");
  run(bf16{}, "bfloat16");
  run(f16{}, "float16");
}

}  // namespace
}  // namespace extrope
