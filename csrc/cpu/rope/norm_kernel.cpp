// RMSNorm and the rotation in one pass, forward and backward. Compiled once for each instruction
// set, with EXTROPE_ISA as its name.
//
// A row is read for its mean square, and once more from the first-level cache to be rotated; where
// all heads of a token share one, a block of tokens is, from the second.

#include "cpu/rope/kernel.h"
#include "cpu/rope/norm.h"

namespace extrope {
namespace {

template <typename T>
struct Angle {
  const Wide<T>*cos, *sin;
};

// out = rotated (in * scale * weight).
template <typename T, bool Interleaved>
void norm_rotate_row(const RopeParams& p, const T* in, T* out, Angle<T> angle,
                     const Wide<T>* weight, Wide<T> scale) {
  const int64_t half = p.rotary_dim / 2;
  for_each_pairs<T, Interleaved>(half, [&](auto width, int64_t i) {
    Pairs<T, Interleaved, decltype(width)::value> x;
    x.load(in, half, i);
    x.normalize(weight, half, scale, i);
    x.rotate(angle.cos, angle.sin, i);
    x.store(out, half, i);
  });
  for_each_rest<T>(p.rotary_dim, p.head_dim, [&](auto lanes, int64_t i) {
    using V = decltype(lanes);
    write(out + i, read<V>(in + i) * scale * load<V>(weight + i));
  });
}

// Sums over rows that share a mean square: x * x, and x * weight * the gradient of what they are
// multiplied to.
template <typename T>
struct Sums {
  Wide<T> squares, product;
};

template <typename T, bool Interleaved>
Sums<T> sums_of_row(const RopeParams& p, const T* grad, const T* saved, Angle<T> angle,
                    const Wide<T>* weight) {
  using V = WideVector<T>;
  const int64_t half = p.rotary_dim / 2;
  V products{};
  Wide<T> product = 0;
  const auto add = [&](auto term) {
    if constexpr (std::is_same_v<decltype(term), V>) {
      products += term;
    } else {
      product += term;
    }
  };
  for_each_pairs<T, Interleaved>(half, [&](auto width, int64_t i) {
    Pairs<T, Interleaved, decltype(width)::value> g, x;
    g.load(grad, half, i);
    g.rotate(angle.cos, angle.sin, i);
    x.load(saved, half, i);
    x.normalize(weight, half, Wide<T>{1}, i);
    for (int v = 0; v < g.kCount; ++v) add(x.a[v] * g.a[v] + x.b[v] * g.b[v]);
  });
  for_each_rest<T>(p.rotary_dim, p.head_dim, [&](auto lanes, int64_t i) {
    using U = decltype(lanes);
    add(read<U>(saved + i) * load<U>(weight + i) * read<U>(grad + i));
  });
  return {sum_of_squares(saved, p.head_dim), product + sum_of(products)};
}

// What a row's backward takes of its sums: dx = scale * (weight * g - normal * mean), where g is
// the gradient rotated back and normal = x * scale.
template <typename T>
struct Scales {
  Scales(const Sums<T>& sums, int64_t count, double eps)
      : scale(inverse_rms(sums.squares, count, eps)),
        mean(sums.product * scale / static_cast<Wide<T>>(count)) {}
  Wide<T> scale, mean;
};

template <typename T, bool Interleaved>
void norm_backward_row(const RopeParams& p, const T* grad, const T* saved, T* out, Angle<T> angle,
                       const Wide<T>* weight, Scales<T> s, Wide<T>* weight_grad) {
  const int64_t half = p.rotary_dim / 2;
  const auto one = [&](auto& g, auto normal, int64_t i) {
    using V = decltype(normal);
    store(weight_grad + i, load<V>(weight_grad + i) + g * normal);
    g = s.scale * (g * load<V>(weight + i) - normal * s.mean);
  };
  for_each_pairs<T, Interleaved>(half, [&](auto width, int64_t i) {
    Pairs<T, Interleaved, decltype(width)::value> g, x;
    g.load(grad, half, i);
    g.rotate(angle.cos, angle.sin, i);
    x.load(saved, half, i);
    for (int v = 0; v < g.kCount; ++v) {
      const int64_t at = i + v * g.kLanes;
      one(g.a[v], x.a[v] * s.scale, at), one(g.b[v], x.b[v] * s.scale, half + at);
    }
    g.store(out, half, i);
  });
  for_each_rest<T>(p.rotary_dim, p.head_dim, [&](auto lanes, int64_t i) {
    using V = decltype(lanes);
    V g = read<V>(grad + i);
    one(g, read<V>(saved + i) * s.scale, i);
    write(out + i, g);
  });
}

// A tensor without weights: rotated, the dims past the pairs copied.
template <typename T, bool Interleaved>
void rotate_only(const RopeParams& p, const T* in, T* out, Angle<T> angle) {
  rotate_row<T, Interleaved, false>({in, out, nullptr}, p.rotary_dim / 2, angle.cos, angle.sin,
                                    nullptr);
  if (in == out) return;
  std::memcpy(out + p.rotary_dim, in + p.rotary_dim, (p.head_dim - p.rotary_dim) * sizeof(T));
}

// Asks for the rows that are some steps ahead.
template <typename T>
inline void fetch_rows(const RopeParams& p, const RopeTensor& x, const T* in, const T* out) {
  const int64_t bytes = p.head_dim * sizeof(T);
  fetch(in, std::min(x.in_head, x.in_seq), kBytesReadAhead, bytes);
  if (in != out) fetch(out, std::min(x.out_head, x.out_seq), kBytesWrittenAhead, bytes);
}

template <typename T, bool Interleaved>
void norm_rotate_tokens(const RopeNormParams& p, int64_t begin, int64_t end) {
  Scratch<T> scratch(p, end - begin);
  const auto place = places<T, Interleaved>(p.head_dim, p.rotary_dim / 2);
  const Norm<T> norms[2] = {{p.norms[0], p.tensors[0], place}, {p.norms[1], p.tensors[1], place}};
  for_each_block(p, begin, end, [&](const Token<double>* tokens, int64_t count) {
    for (int64_t n = 0; n < p.num_tensors; ++n) {
      const RopeTensor& x = p.tensors[n];
      const Norm<T>& norm = norms[n];
      const int64_t dims = norm.together * p.head_dim;
      Wide<T> scales[kBlock];
      for (int64_t t = 0; norm.head_step > 0 && t < count; ++t) {
        Wide<T> squares = 0;
        for (int64_t head = 0; head < x.heads; ++head) {
          squares += sum_of_squares(input_row<T>(x, tokens[t], head), p.head_dim);
        }
        scales[t] = inverse_rms(squares, dims, p.norm_eps);
      }
      for_each_row<T, Interleaved>(
          p, x, tokens, count, scratch, /*filled=*/n > 0 && !p.log_decay,
          [&](int64_t t, int64_t head, const Wide<T>* cos, const Wide<T>* sin) {
            const T* in = input_row<T>(x, tokens[t], head);
            T* out = output_row<T>(x, tokens[t], head);
            if (norm.weight.empty()) return rotate_only<T, Interleaved>(p, in, out, {cos, sin});
            const Wide<T> scale = norm.head_step > 0
                                      ? scales[t]
                                      : inverse_rms(sum_of_squares(in, dims), dims, p.norm_eps);
            norm_rotate_row<T, Interleaved>(p, in, out, {cos, sin},
                                            &norm.weight[head * norm.head_step], scale);
            fetch_rows(p, x, in, out);
          });
    }
  });
}

// One tensor of one block, its share of the weights' gradients added to weight_grad.
template <typename T, bool Interleaved>
void norm_backward_block(const RopeNormParams& p, int64_t n, const Norm<T>& norm,
                         const Token<double>* tokens, int64_t count, Scratch<T>& scratch,
                         Buffer<Wide<T>>& weight_grad) {
  const RopeTensor& x = p.tensors[n];
  bool filled = n > 0 && !p.log_decay;
  const auto sums_of = [&](int64_t t, int64_t head, Angle<T> angle) {
    return sums_of_row<T, Interleaved>(p, input_row<T>(x, tokens[t], head),
                                       saved_row<T>(x, tokens[t], head), angle,
                                       &norm.weight[head * norm.head_step]);
  };
  Sums<T> sums[kBlock] = {};
  if (norm.head_step > 0) {
    for_each_row<T, Interleaved>(
        p, x, tokens, count, scratch, filled,
        [&](int64_t t, int64_t head, const Wide<T>* cos, const Wide<T>* sin) {
          const Sums<T> row = sums_of(t, head, {cos, sin});
          sums[t].squares += row.squares, sums[t].product += row.product;
        });
    filled = true;
  }
  for_each_row<T, Interleaved>(
      p, x, tokens, count, scratch, filled,
      [&](int64_t t, int64_t head, const Wide<T>* cos, const Wide<T>* sin) {
        const Angle<T> angle{cos, sin};
        const T *grad = input_row<T>(x, tokens[t], head), *saved = nullptr;
        T* out = output_row<T>(x, tokens[t], head);
        if (norm.weight.empty()) return rotate_only<T, Interleaved>(p, grad, out, angle);
        saved = saved_row<T>(x, tokens[t], head);
        const Sums<T> of_row = norm.head_step > 0 ? sums[t] : sums_of(t, head, angle);
        const int64_t at = head * norm.head_step;
        norm_backward_row<T, Interleaved>(p, grad, saved, out, angle, &norm.weight[at],
                                          Scales<T>(of_row, norm.together * p.head_dim, p.norm_eps),
                                          &weight_grad[at]);
        fetch_rows(p, x, grad, out);
        fetch(saved, std::min(x.saved_head, x.saved_seq), kBytesReadAhead, p.head_dim * sizeof(T));
      });
}

template <typename T, bool Interleaved>
void norm_backward_parts(const RopeNormParams& p, int64_t begin, int64_t end) {
  Scratch<T> scratch(p, kBlock);
  const auto place = places<T, Interleaved>(p.head_dim, p.rotary_dim / 2);
  const Norm<T> norms[2] = {{p.norms[0], p.tensors[0], place}, {p.norms[1], p.tensors[1], place}};
  Buffer<Wide<T>> grads[2];
  for (int64_t part = begin; part < end; ++part) {
    for (int n = 0; n < 2; ++n) grads[n].assign(norms[n].weight.size(), 0);
    const int64_t first = part * p.norm_part_tokens;
    const int64_t last = std::min(first + p.norm_part_tokens, p.batch * p.seqlen);
    for_each_block(p, first, last, [&](const Token<double>* tokens, int64_t count) {
      for (int64_t n = 0; n < p.num_tensors; ++n) {
        norm_backward_block<T, Interleaved>(p, n, norms[n], tokens, count, scratch, grads[n]);
      }
    });
    for (int n = 0; n < 2; ++n) {
      Wide<T>* to = static_cast<Wide<T>*>(p.norm_parts[n]) + part * p.norm_part_stride;
      const int64_t dims = grads[n].size();
      for (int64_t i = 0; i < dims; ++i)
        to[i - i % p.head_dim + place[i % p.head_dim]] = grads[n][i];
    }
  }
}

template <typename T>
void run(const RopeNormParams& p, int64_t begin, int64_t end) {
  if (p.norm_part_tokens > 0) {
    return p.interleaved ? norm_backward_parts<T, true>(p, begin, end)
                         : norm_backward_parts<T, false>(p, begin, end);
  }
  p.interleaved ? norm_rotate_tokens<T, true>(p, begin, end)
                : norm_rotate_tokens<T, false>(p, begin, end);
}

}  // namespace

void EXTROPE_EXPAND(rope_norm_, EXTROPE_ISA)(const RopeNormParams& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case DType::f32:
      return run<float>(p, begin, end);
    case DType::f64:
      return run<double>(p, begin, end);
    case DType::bf16:
      return run<bf16>(p, begin, end);
    case DType::f16:
      return run<f16>(p, begin, end);
  }
}

}  // namespace extrope
