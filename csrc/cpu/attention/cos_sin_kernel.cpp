// Cosines and sines of an attention call's tokens under a position map, and 16-bit keys rotated by
// them. Compiled once per instruction set, with EXTROPE_ISA as its name.

#include <algorithm>

#include "cpu/attention/cos_sin.h"
#include "cpu/runtime/pair_angles.h"
#include "cpu/runtime/workspace.h"
#include "cpu/simd/e4m3.h"
#include "cpu/simd/rotate_to_float.h"
#include "cpu/simd/sincos.h"

namespace extrope {
namespace {

template <typename T, typename Out>
void rotate_keys(const AttentionParams& p, const AttentionTensor& k, const CosSin& cos_sin,
                 const AttentionTensor& out, int64_t begin, int64_t end) {
  float row[kMaxHeadDim];
  for (int64_t i = begin; i < end; ++i) {
    const int64_t batch = i / p.seqlen_k, token = i % p.seqlen_k;
    int64_t at = batch * cos_sin.stride_batch + token * cos_sin.stride_seq;
    for (int64_t head = 0; head < p.heads_k; ++head, at += cos_sin.stride_head) {
      const auto first_of = [&](const AttentionTensor& x) {
        return batch * x.stride_batch + x.at(token) + head * x.stride_head;
      };
      const T* in = static_cast<const T*>(k.data) + first_of(k);
      rotate_to_float(p.rotation, in, cos_sin.cos + at, cos_sin.sin + at, 1.0f, row);
      narrow_row(row, p.head_dim, static_cast<Out*>(out.data) + first_of(out));
    }
  }
}

// Fills one token's row in each head.
inline void fill_token(const CosSinTable& t, const double* inv_freq, int64_t position, float* row) {
  const bool of_pairs = t.is_of_pairs();
  const double at = of_pairs ? 1.0 : t.map(position) - t.from(position);
  const Angles angles{
      .position = at, .amplitude = t.amplitude, .decay = at, .log_decay = t.log_decay};
  PairAngles pairs;
  for (int64_t head = 0; head < t.heads; ++head, inv_freq += t.freq_head, row += 2 * t.padded) {
    const double* freq = inv_freq;
    if (of_pairs) freq = pairs.fill(t.pair_maps, t.map, t.from, position, inv_freq);
    fill_sincos(freq, t.half, angles, row, row + t.padded);
  }
}

}  // namespace

void EXTROPE_EXPAND(fill_cos_sin_, EXTROPE_ISA)(const CosSinTable& t, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    int64_t sequence = i / t.tokens, position = i % t.tokens;
    if (t.cu_seqlens) {
      const int32_t* last = t.cu_seqlens + t.num_sequences + 1;
      sequence =
          std::upper_bound(t.cu_seqlens, last, static_cast<int32_t>(position)) - t.cu_seqlens - 1;
      position -= t.cu_seqlens[sequence];
    }
    position += t.start.of(sequence);
    fill_token(t, t.inv_freq + sequence * t.freq_row, position, t.out + i * t.stride());
  }
}

void EXTROPE_EXPAND(rotate_keys_, EXTROPE_ISA)(const AttentionParams& p, const AttentionTensor& k,
                                               const CosSin& cos_sin, const AttentionTensor& out,
                                               int64_t begin, int64_t end) {
  const bool as_bf16 = p.dtype == DType::bf16;
  if (k.is_e4m3) {
    return as_bf16 ? rotate_keys<e4m3, bf16>(p, k, cos_sin, out, begin, end)
                   : rotate_keys<e4m3, f16>(p, k, cos_sin, out, begin, end);
  }
  as_bf16 ? rotate_keys<bf16, bf16>(p, k, cos_sin, out, begin, end)
          : rotate_keys<f16, f16>(p, k, cos_sin, out, begin, end);
}

}  // namespace extrope
