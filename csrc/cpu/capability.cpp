#include "capability.h"

#include <algorithm>
#include <cstdlib>
#include <string>

namespace extrope {
namespace {

Capability supported() {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return kAvx512;
  }
  if (avx2) return kAvx2;
#endif
  return kBaseline;
}

}  // namespace

Capability capability() {
  static const Capability chosen = [] {
    const char* wanted = std::getenv("EXTROPE_CPU_CAPABILITY");
    const std::string name = wanted ? wanted : "avx512";
    const Capability limit = name == "baseline" ? kBaseline : name == "avx2" ? kAvx2 : kAvx512;
    return std::min(limit, supported());
  }();
  return chosen;
}

}  // namespace extrope
