// The fused step into a cache: RMSNorm, the rotation, and the write of keys and values, in one pass
// over all of them. The kernel is that of csrc/cuda/rope/norm_forward.h; rows go to their slots.
#include <cuda_fp8.h>

#include "cuda/append/kernel.h"
#include "cuda/append/places.h"
#include "cuda/rope/norm_forward.h"

namespace extrope {
namespace {

constexpr int OPERANDS = 3;  // q, k, v

struct AppendCall {
  static constexpr bool QUANTIZES = true;

  AppendParams p;
  RopeParams rope;
  double norm_eps;
  NormOperand of[OPERANDS];

  __device__ Token<double> token(int index) const { return place_token(p, index); }

  template <typename T>
  __device__ RowTarget target(int operand, const Token<double>& token, int) const {
    const RopeTensor& x = of[operand].x;
    if (operand == 0) {
      return {static_cast<T*>(x.out) + token.batch * x.out_batch + token.seq * x.out_seq,
              x.out_head, nullptr};
    }
    const CachePlace place = p.slots != nullptr ? slot_given(p, token) : slot_behind(p, token);
    if (!place.exists) return {nullptr, 0, nullptr};
    const float* scale = operand == 1 ? p.cache.k_scale : p.cache.v_scale;
    const int64_t element = scale != nullptr ? 1 : sizeof(T);
    const int64_t first = place.block * x.out_batch + place.slot * x.out_seq;
    return {static_cast<char*>(x.out) + first * element, x.out_head, scale};
  }

  // Rounded to T, as where the cache is of it, then over the head's scale.
  template <typename T, int VEC>
  __device__ static void quantize(const RowTarget& target, int head, int64_t at,
                                  const Lanes<T, VEC>& lanes) {
    constexpr int BYTES = VEC < 4 ? VEC : 4;
    Accumulator<T> dims[VEC];
    unpack(lanes, dims);
    const float scale = target.scale[head];
    uint8_t* to = static_cast<uint8_t*>(target.at) + at;
#pragma unroll
    for (int j = 0; j < VEC; j += BYTES) {
      uint32_t word = 0;
#pragma unroll
      for (int i = 0; i < BYTES; ++i) {
        const float x = static_cast<float>(dims[j + i]) / scale;
        const uint32_t byte = __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
        word |= byte << (8 * i);
      }
      if constexpr (BYTES == 4) {
        store<uint32_t, 1>(reinterpret_cast<uint32_t*>(to + j), Lanes<uint32_t, 1>{{word}});
      } else {
        to[j] = static_cast<uint8_t>(word);
      }
    }
  }
};

AppendCall append_call(const AppendParams& p, int vec, int64_t wide) {
  AppendCall call{};
  call.p = p, call.rope = p.rope, call.norm_eps = p.norm_eps;
  const bool per_head = p.rope.freq_head != 0;
  const int64_t pairs = p.rope.rotary_dim;
  const auto operand = [&](const RopeTensor& x, const RopeNorm& norm, int64_t dim, bool rotates) {
    return norm_operand(x, norm, dim, rotates ? pairs : 0, vec, wide, per_head);
  };
  call.of[0] = operand(p.q, p.q_norm, p.cache.head_dim, p.rotates_q);
  call.of[1] = operand(p.k, p.k_norm, p.cache.head_dim, p.rotates_k);
  call.of[2] = operand(p.v, RopeNorm{}, p.cache.head_dim_v, false);
  return call;
}

bool append_fits(const AppendCall& call, int vec, int bytes) {
  const AppendParams& p = call.p;
  const int cached = p.cache.is_e4m3() ? 1 : bytes;
  for (const NormOperand& of : call.of) {
    if (of.x.heads == 0) continue;
    if (!fits(of, p.rope.batch, p.rope.seqlen, vec, bytes)) return false;
  }
  return output_fits(call.of[0].x, p.rope.batch, p.rope.seqlen, vec, bytes) &&
         output_fits(call.of[1].x, p.blocks, p.cache.page_size, vec, cached) &&
         output_fits(call.of[2].x, p.blocks, p.cache.page_size, vec, cached);
}

template <typename T>
int choose(const AppendParams& p, void* stream) {
  constexpr int VEC = std::is_same_v<T, double> ? 1 : 16 / sizeof(T);
  constexpr int64_t WIDE = sizeof(Accumulator<T>);
  if constexpr (VEC > 1) {
    const AppendCall call = append_call(p, VEC, WIDE);
    if (append_fits(call, VEC, sizeof(T))) {
      return launch_norm_forward<T, VEC>(call, OPERANDS, stream);
    }
  }
  return launch_norm_forward<T, 1>(append_call(p, 1, WIDE), OPERANDS, stream);
}

}  // namespace

int rope_append_launch(const AppendParams& p, void* stream) {
  switch (p.rope.dtype) {
    case DType::f32:
      return choose<float>(p, stream);
    case DType::f64:
      return choose<double>(p, stream);
    case DType::bf16:
      return choose<__nv_bfloat16>(p, stream);
    default:
      return choose<__half>(p, stream);
  }
}

}  // namespace extrope
