// The rotation on the CPU. Compiled once for each instruction set, with EXTROPE_ISA as its name.
//
// Tokens go in small blocks: the cosines and sines of a block are computed once, stay in the
// first-level cache, and serve every head of q and k. Within a block the loop over heads is inside
// or outside the loop over tokens, whichever goes through memory forward.

#include "cpu/rope/block.h"
#include "cpu/rope/kernel.h"

namespace extrope {
namespace {

template <typename T>
struct Row {
  const T* in;
  T* out;
  const T* saved;
};

// One row of one head: out = rotated in; with Grad also angle_grad += saved x out.
template <typename T, bool Interleaved, bool Grad>
void rotate_row(Row<T> row, int64_t half, const Wide<T>* cos, const Wide<T>* sin,
                Wide<T>* angle_grad) {
  for_each_pairs<T, Interleaved>(half, [&](auto width, int64_t i) {
    using Some = Pairs<T, Interleaved, decltype(width)::value>;
    using V = typename Some::V;
    Some x;
    x.load(row.in, half, i);
    x.rotate(cos, sin, i);
    if constexpr (Grad) {
      Some saved;
      saved.load(row.saved, half, i);
      V cross[Some::kCount];
      for (int v = 0; v < Some::kCount; ++v) cross[v] = saved.a[v] * x.b[v] - saved.b[v] * x.a[v];
      if constexpr (Some::kCount == 2) {
        const auto [even, odd] = load_pairs(angle_grad + i);
        store_pairs(angle_grad + i, even + cross[0], odd + cross[1]);
      } else {
        store(angle_grad + i, load<V>(angle_grad + i) + cross[0]);
      }
    }
    x.store(row.out, half, i);
  });
}

template <typename T, bool Interleaved>
void rotate_one(const RopeParams& p, const RopeTensor& tensor, const Token<double>& token,
                int64_t head, const Wide<T>* cos, const Wide<T>* sin) {
  const T* in = static_cast<const T*>(tensor.in) + token.batch * tensor.in_batch +
                token.seq * tensor.in_seq + head * tensor.in_head;
  T* out = static_cast<T*>(tensor.out) + token.batch * tensor.out_batch +
           token.seq * tensor.out_seq + head * tensor.out_head;
  const int64_t half = p.rotary_dim / 2;
  if (p.angle_grad) {
    const T* saved = static_cast<const T*>(tensor.saved) + token.batch * tensor.saved_batch +
                     token.seq * tensor.saved_seq + head * tensor.saved_head;
    const int64_t row =
        (token.batch * p.seqlen + token.seq) * p.angle_heads + (p.angle_heads > 1 ? head : 0);
    rotate_row<T, Interleaved, true>({in, out, saved}, half, cos, sin,
                                     static_cast<Wide<T>*>(p.angle_grad) + row * half);
  } else {
    rotate_row<T, Interleaved, false>({in, out, nullptr}, half, cos, sin, nullptr);
  }
  const int64_t bytes = p.head_dim * sizeof(T);
  fetch(in, std::min(tensor.in_head, tensor.in_seq), kBytesReadAhead, bytes);
  if (in == out) return;
  fetch(out, std::min(tensor.out_head, tensor.out_seq), kBytesWrittenAhead, bytes);
  if (p.head_dim > p.rotary_dim) {
    std::memcpy(out + p.rotary_dim, in + p.rotary_dim, (p.head_dim - p.rotary_dim) * sizeof(T));
  }
}

template <typename T, bool Interleaved>
void rotate_block(const RopeParams& p, const Token<double>* tokens, int64_t count,
                  Scratch<T>& scratch) {
  const auto one = [&](const RopeTensor& tensor, int64_t t, int64_t head) {
    rotate_one<T, Interleaved>(p, tensor, tokens[t], head, &scratch.cos[t * scratch.stride],
                               &scratch.sin[t * scratch.stride]);
  };
  for (int64_t n = 0; n < p.num_tensors; ++n) {
    const RopeTensor& tensor = p.tensors[n];
    if (p.angle_heads > 1) {
      for (int64_t head = 0; head < tensor.heads; ++head) {
        fill_block<T, Interleaved>(p, tensor, tokens, count, head, scratch);
        for (int64_t t = 0; t < count; ++t) one(tensor, t, head);
      }
      continue;
    }
    if (n == 0 || p.log_decay) fill_block<T, Interleaved>(p, tensor, tokens, count, 0, scratch);
    if (tensor.in_head < tensor.in_seq) {
      for (int64_t t = 0; t < count; ++t) {
        for (int64_t head = 0; head < tensor.heads; ++head) one(tensor, t, head);
      }
    } else {
      for (int64_t head = 0; head < tensor.heads; ++head) {
        for (int64_t t = 0; t < count; ++t) one(tensor, t, head);
      }
    }
  }
}

template <typename T, bool Interleaved>
void rotate_tokens(const RopeParams& p, int64_t begin, int64_t end) {
  Scratch<T> scratch(p, end - begin);
  Token<double> tokens[kBlock];
  if (p.angle_grad) {
    const int64_t row = p.angle_heads * p.rotary_dim / 2;
    std::fill_n(static_cast<Wide<T>*>(p.angle_grad) + begin * row, (end - begin) * row, Wide<T>{0});
  }
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t count = std::min(kBlock, end - first);
    for (int64_t t = 0; t < count; ++t) {
      tokens[t] = locate<double>(p, (first + t) / p.seqlen, (first + t) % p.seqlen);
    }
    rotate_block<T, Interleaved>(p, tokens, count, scratch);
  }
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
