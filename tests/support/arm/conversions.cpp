// Conversions of 16-bit floats, which are instructions on some machines and code on others.
#include "driver.h"

namespace extrope {
namespace {

constexpr int64_t kAll = 1 << 16;

// As bits, the same everywhere, but for what is left of a NaN.
template <typename T>
void write_bits(const std::string& name, std::vector<T>& values) {
  for (T& x : values) {
    if (widen(x) != widen(x)) narrow(__builtin_nanf(""), x);
  }
  write("conversions/" + name, Moved<T>{values});
}

// Every value that the type has, one by one and by vectors.
template <typename T>
void widen_all(const std::string& name) {
  std::vector<T> from(kAll);
  std::vector<float> one(kAll), many(kAll);
  for (int64_t i = 0; i < kAll; ++i) from[i].bits = static_cast<uint16_t>(i);
  for (int64_t i = 0; i < kAll; ++i) one[i] = widen(from[i]);
  for (int64_t i = 0; i < kAll; i += kFloats) store(&many[i], load_wide(&from[i]));
  write_bits("widen/" + name, one);
  write_bits("widen_vector/" + name, many);
}

// All exponents, and between them what rounds up, down and to even.
template <typename T>
void narrow_some(const std::string& name) {
  Random random(1);
  std::vector<float> from(kAll);
  for (int64_t i = 0; i < kAll; ++i) {
    const uint32_t low = i % 3 == 0   ? 0x1000 * static_cast<uint32_t>(random.below(16))
                         : i % 3 == 1 ? static_cast<uint32_t>(random.below(1 << 16))
                                      : 0xffff - static_cast<uint32_t>(random.below(2));
    from[i] = bits_as<float>(static_cast<uint32_t>(i) << 16 | low);
  }
  std::vector<T> one(kAll), many(kAll);
  for (int64_t i = 0; i < kAll; ++i) narrow(from[i], one[i]);
  for (int64_t i = 0; i < kAll; i += kFloats) store_narrow(&many[i], load<floats>(&from[i]));
  write_bits("narrow/" + name, one);
  write_bits("narrow_vector/" + name, many);
}

}  // namespace

void run_conversions() {
  widen_all<bf16>("bfloat16");
  widen_all<f16>("float16");
  narrow_some<bf16>("bfloat16");
  narrow_some<f16>("float16");
}

}  // namespace extrope
