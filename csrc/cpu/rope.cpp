// Registers the CPU kernels of the rotation and splits their work over torch's threads.

#include "rope.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdlib>
#include <string>

#include "../common/rope_bind.h"
#include "huge_pages.h"

namespace extrope {
namespace {

// A thread that gets less than this many bytes costs more to wake than it saves.
constexpr int64_t kBytesPerThread = 128 * 1024;

enum Capability : int64_t { kBaseline, kAvx2, kAvx512 };

Capability supported() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
  return kBaseline;
}

// EXTROPE_CPU_CAPABILITY lowers the choice, for tests of the narrower kernels on a wider processor.
Capability capability() {
  static const Capability chosen = [] {
    const char* wanted = std::getenv("EXTROPE_CPU_CAPABILITY");
    const std::string name = wanted ? wanted : "avx512";
    const Capability limit = name == "baseline" ? kBaseline : name == "avx2" ? kAvx2 : kAvx512;
    return std::min(limit, supported());
  }();
  return chosen;
}

RopeTokens kernel() {
#if defined(__x86_64__)
  switch (capability()) {
    case kAvx512:
      return rope_tokens_avx512;
    case kAvx2:
      return rope_tokens_avx2;
    default:
      break;
  }
#endif
  return rope_tokens_baseline;
}

void check_boundaries(const RopeParams& p) {
  const int32_t* cu = p.cu_seqlens;
  bool ordered = cu[0] == 0 && cu[p.num_sequences] == p.seqlen;
  for (int64_t i = 0; ordered && i < p.num_sequences; ++i) ordered = cu[i] <= cu[i + 1];
  require(ordered, "cu_seqlens must rise from 0 to the number of tokens ", p.seqlen);
}

int64_t element_size(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

void prepare_outputs(const RopeParams& p) {
  for (int64_t n = 0; n < p.num_tensors; ++n) {
    const RopeTensor& t = p.tensors[n];
    const int64_t elements = p.batch * p.seqlen * t.heads * p.head_dim;
    if (t.out != t.in) prefer_huge_pages(t.out, elements * element_size(p.dtype));
  }
}

void launch(const RopeParams& p, int /*device_index*/) {
  if (p.cu_seqlens) check_boundaries(p);
  prepare_outputs(p);
  const RopeTokens tokens = kernel();
  const int64_t count = p.batch * p.seqlen;
  const int64_t heads = p.tensors[0].heads + p.tensors[1].heads;
  const int64_t bytes = std::max<int64_t>(heads * p.head_dim * element_size(p.dtype), 1);
  const int64_t grain = kBytesPerThread / bytes + 1;
  if (count <= grain) return tokens(p, 0, count);
  torch::stable::parallel_for(0, count, grain,
                              [&](int64_t begin, int64_t end) { tokens(p, begin, end); });
}

int64_t cpu_capability() { return capability(); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(extrope, CPU, m) {
  m.impl("rope_fwd", TORCH_BOX(&RopeOps<launch>::fwd));
  m.impl("rope_bwd", TORCH_BOX(&RopeOps<launch>::bwd));
  m.impl("rope_inplace", TORCH_BOX(&RopeOps<launch>::inplace));
}

STABLE_TORCH_LIBRARY_IMPL(extrope, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
}

}  // namespace extrope
