#include "cpu/runtime/capability.h"

#include <algorithm>
#include <cstdlib>
#include <string>

#if defined(EXTROPE_HAS_BF16)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace extrope {

#if defined(__aarch64__)

// Every such processor has it, and kernels there are compiled for nothing more.
Capability capability() { return kNeon; }

#else

namespace {

#if defined(EXTROPE_HAS_BF16)
bool pairs_of_bf16() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kAvx512Bf16Bit = 1u << 5;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & kAvx512Bf16Bit) != 0;
}

// Returns true if the processor has the instructions and Linux grants this process the tiles. They
// are 8 KiB of state per thread, which Linux saves only for processes that have asked.
bool tiles() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBf16) == 0 || (d & kTile) == 0)
    return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl()
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

Capability supported(Capability limit) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
#if defined(EXTROPE_HAS_BF16)
    if (pairs_of_bf16()) {
      if (limit == kAmx && tiles()) return kAmx;
      // On Intel a product of pairs takes four times as long as one of floats, and floats make
      // attention twice as fast: there pairs are used only on request.
      if (limit == kAvx512Bf16 || !__builtin_cpu_is("intel")) return kAvx512Bf16;
    }
#endif
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
    const std::string name = wanted ? wanted : "amx";
    const Capability limit = name == "baseline"      ? kBaseline
                             : name == "avx2"        ? kAvx2
                             : name == "avx512"      ? kAvx512
                             : name == "avx512_bf16" ? kAvx512Bf16
                                                     : kAmx;
    return std::min(limit, supported(limit));
  }();
  return chosen;
}

#endif

}  // namespace extrope
