// Registers the CPU kernels of the rotation and splits their work over torch's threads.

#include "rope.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../common/rope_bind.h"
#include "capability.h"
#include "huge_pages.h"

namespace extrope {
namespace {

// A thread that gets less than this many bytes costs more to wake than it saves.
constexpr int64_t kBytesPerThread = 128 * 1024;

RopeTokens kernel() {
#if defined(__x86_64__)
  switch (capability()) {
    case kAmx:
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

void check_axes(const RopeParams& p) {
  for (int64_t i = 0; i < p.rotary_dim / 2; ++i) {
    require(0 <= p.axes[i] && p.axes[i] < p.num_axes, "axes must be from 0 to ", p.num_axes - 1,
            " for positions of ", p.num_axes, " axes, got ", p.axes[i]);
  }
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
  if (p.axes) check_axes(p);
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
