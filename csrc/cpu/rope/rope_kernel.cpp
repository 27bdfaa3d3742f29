// The rotation on the CPU. Compiled once per instruction set, with EXTROPE_ISA as its name.
//
// Tokens go in small blocks: the cosines and sines of a block are computed once, stay in the
// first-level cache, and serve every head of q and k. Within a block the loop over heads is inside
// or outside the loop over tokens: the order that goes through memory forward.
//
// Types of the headers:
//   RopeTensor         q or k of the call p: in, out, and the forward's input `saved`, with strides
//   Token              its batch, seq and position, which is a double
//   Row                pointers to dim 0 of one token and head: in, out, saved
//   Wide<T>            float, or double if T is double
//   AngleScratch       the cosines and sines of a block; TokenCosSin points to those of its token t
//   RowForm            kHalf pairs if they are all dims, in registers as PairValues; 0: any number
//                      of pairs, in memory. kStreams: out is written past the caches
//   PrefetchDistances  elements from a row to the one to prefetch
//   Run                tokens of a block and heads that share its cosines and sines; of_heads: in
//                      memory, a token's heads follow one another
// angle_heads is 1, or the number of heads if each has frequencies, and gradients, of its own.

#include "cpu/rope/cos_sin.h"
#include "cpu/rope/kernel.h"
#include "cpu/rope/prefetch.h"
#include "cpu/rope/row_form.h"

namespace extrope {
namespace {

// Rotates `count` heads of one token, from `head` on, by the same cosines and sines. Addresses and
// cosines are set up once for all: that would be a third of a single row's time.
template <typename T, bool Interleaved, bool Grad, typename Form>
void rotate_heads(const RopeParams& p, const RopeTensor& tensor, const Token<double>& token,
                  int64_t head, int64_t count, TokenCosSin<T> cos_sin,
                  const PrefetchDistances& ahead) {
  Row<T> row{input_row<T>(tensor, token, head), output_row<T>(tensor, token, head), nullptr};
  if (!row.out) return;  // out is a cache without a slot for this token
  constexpr int64_t kHalf = Form::kHalf;
  const int64_t half = p.rotary_dim / 2;
  Wide<T>* angle_grad = nullptr;
  if constexpr (Grad) {
    const int64_t at = (token.batch * p.seqlen + token.seq) * p.angle_heads;
    angle_grad = static_cast<Wide<T>*>(p.angle_grad) + (at + (p.angle_heads > 1 ? head : 0)) * half;
    row.saved = saved_row<T>(tensor, token, head);
  }
  const PrefetchDistances far = ahead;  // a copy: stores to rows might change a reference's values
  const PairValues<T, kHalf> cos(cos_sin.cos), sin(cos_sin.sin);
  const int64_t in_step = tensor.in_head, out_step = tensor.out_head;
  const int64_t saved_step = tensor.saved_head;
  const bool in_place = row.in == row.out;
  const bool copies = kHalf == 0 && !in_place && p.rotary_dim < p.head_dim;
  const int64_t first = kHalf > 0 ? 0 : p.rotary_offset;
  const int64_t bytes = kHalf > 0 ? 2 * kHalf * sizeof(T) : far.bytes;
  for (; count > 0; --count) {
    Row<T> rotated{row.in + first, row.out + first, nullptr};
    if constexpr (Grad) rotated.saved = row.saved + first;
    rotate_row<T, Interleaved, Grad, kHalf, Form::kStreams>(rotated, half, cos, sin, angle_grad);
    prefetch(row.in, far.in, bytes);
    if (!in_place && !Form::kStreams) prefetch(row.out, far.out, bytes);
    if (copies) copy_rest(p, row.in, row.out);
    row.in += in_step, row.out += out_step;
    if constexpr (Grad) row.saved += saved_step;
  }
}

template <typename T, bool Interleaved>
auto heads_of(const RopeParams& p, const RopeTensor& tensor) {
  if (p.angle_grad) return rotate_heads<T, Interleaved, true, RowForm<0, false>>;
  return with_row_form<T>(
      p, tensor, [](auto form) { return rotate_heads<T, Interleaved, false, decltype(form)>; });
}

template <typename T, bool Interleaved>
void rotate_tokens(const RopeParams& p, int64_t begin, int64_t end) {
  AngleScratch<T> scratch(p, end - begin);
  if (p.angle_grad) {
    const int64_t row = p.angle_heads * p.rotary_dim / 2;
    std::fill_n(static_cast<Wide<T>*>(p.angle_grad) + begin * row, (end - begin) * row, Wide<T>{0});
  }
  const PrefetchDistances ahead[] = {{p, p.tensors[0], sizeof(T)}, {p, p.tensors[1], sizeof(T)}};
  const decltype(heads_of<T, Interleaved>(p, p.tensors[0])) rotate[] = {
      heads_of<T, Interleaved>(p, p.tensors[0]), heads_of<T, Interleaved>(p, p.tensors[1])};
  for_each_block(p, begin, end, [&](const Token<double>* tokens, int64_t count) {
    for (int64_t n = 0; n < p.num_tensors; ++n) {
      const RopeTensor& tensor = p.tensors[n];
      // k takes the cosines and sines of q, unless it decays the other way (xPos).
      for_each_run<T>(p, tensor, tokens, count, scratch, /*filled=*/n > 0 && !p.log_decay,
                      [&](Run run) {
                        const int64_t together = run.of_heads ? run.heads : 1;
                        for (int64_t head = 0; head < run.heads; head += together) {
                          for (int64_t t = 0; t < run.tokens; ++t) {
                            rotate[n](p, tensor, tokens[t], run.first_head + head, together,
                                      {scratch, t}, ahead[n]);
                          }
                        }
                      });
    }
  });
  if (streams_any_output<T>(p)) fence_streaming_stores();
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
