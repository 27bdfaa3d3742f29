// The rotation on the CPU. Compiled once for each instruction set, with EXTROPE_ISA as its name.
//
// Tokens go in small blocks: the cosines and sines of a block are computed once, stay in the
// first-level cache, and serve every head of q and k. Within a block the loop over heads is inside
// or outside the loop over tokens, whichever goes through memory forward.

#include "cpu/rope/block.h"
#include "cpu/rope/kernel.h"

namespace extrope {
namespace {

template <typename T, bool Interleaved>
void rotate_one(const RopeParams& p, const RopeTensor& tensor, const Token<double>& token,
                int64_t head, Angle<T> angle, const Ahead& ahead) {
  const T* in = input_row<T>(tensor, token, head);
  T* out = output_row<T>(tensor, token, head);
  if (!out) return;
  const int64_t half = p.rotary_dim / 2;
  if (p.angle_grad) {
    const int64_t row =
        (token.batch * p.seqlen + token.seq) * p.angle_heads + (p.angle_heads > 1 ? head : 0);
    rotate_row<T, Interleaved, true>({in, out, saved_row<T>(tensor, token, head)}, half, angle.cos,
                                     angle.sin, static_cast<Wide<T>*>(p.angle_grad) + row * half);
  } else {
    rotate_row<T, Interleaved, false>({in, out, nullptr}, half, angle.cos, angle.sin, nullptr);
  }
  fetch(in, ahead.in, ahead.bytes);
  if (in == out) return;
  fetch(out, ahead.out, ahead.bytes);
  if (p.head_dim > p.rotary_dim) {
    std::memcpy(out + p.rotary_dim, in + p.rotary_dim, (p.head_dim - p.rotary_dim) * sizeof(T));
  }
}

template <typename T, bool Interleaved>
void rotate_tokens(const RopeParams& p, int64_t begin, int64_t end) {
  Scratch<T> scratch(p, end - begin);
  if (p.angle_grad) {
    const int64_t row = p.angle_heads * p.rotary_dim / 2;
    std::fill_n(static_cast<Wide<T>*>(p.angle_grad) + begin * row, (end - begin) * row, Wide<T>{0});
  }
  const Ahead ahead[] = {{p, p.tensors[0], sizeof(T)}, {p, p.tensors[1], sizeof(T)}};
  for_each_block(p, begin, end, [&](const Token<double>* tokens, int64_t count) {
    for (int64_t n = 0; n < p.num_tensors; ++n) {
      const RopeTensor& tensor = p.tensors[n];
      for_each_run<T>(
          p, tensor, tokens, count, scratch, /*filled=*/n > 0 && !p.log_decay, [&](Run run) {
            run.for_each_row([&](int64_t t, int64_t head) {
              rotate_one<T, Interleaved>(p, tensor, tokens[t], head, {scratch, t}, ahead[n]);
            });
          });
    }
  });
}

template <typename T>
void rotate_layout(const RopeParams& p, int64_t begin, int64_t end) {
  p.interleaved ? rotate_tokens<T, true>(p, begin, end) : rotate_tokens<T, false>(p, begin, end);
}

}  // namespace

void EXTROPE_EXPAND(rope_tokens_, EXTROPE_ISA)(const RopeParams& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case DType::f32:
      return rotate_layout<float>(p, begin, end);
    case DType::f64:
      return rotate_layout<double>(p, begin, end);
    case DType::bf16:
      return rotate_layout<bf16>(p, begin, end);
    case DType::f16:
      return rotate_layout<f16>(p, begin, end);
  }
}

}  // namespace extrope
