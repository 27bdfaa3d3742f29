// RMSNorm and the rotation in one pass, forward and backward. Compiled once for each instruction
// set, with EXTROPE_ISA as its name.
//
// A row is read for its mean square, and once more, from the first-level cache, to be rotated.
// Where all heads of a token share a mean square and do not lie together, a whole block of tokens
// is read before it is rotated, the second time from the second-level cache.

#include "cpu/rope/kernel.h"
#include "cpu/rope/norm.h"
#include "cpu/rope/norm_forward.h"

namespace extrope {
namespace {

// The products weight * x * gradient rotated back of a row, summed but for the lanes.
template <typename T, bool Interleaved>
WideVector<T> products_of(const RopeParams& p, const T* grad, const T* saved, CosSin<T> cos_sin,
                          const Wide<T>* weight) {
  using V = WideVector<T>;
  const int64_t half = p.rotary_dim / 2;
  V products{};
  const auto add = [&](auto term) {
    if constexpr (std::is_same_v<decltype(term), V>) {
      products += term;
    } else {
      products[0] += term;
    }
  };
  for_each_pairs<T, Interleaved>(half, [&](auto width, int64_t i) {
    Pairs<T, Interleaved, decltype(width)::value> g, x;
    g.load(grad, half, i);
    g.rotate(cos_sin.cos, cos_sin.sin, i);
    x.load(saved, half, i);
    x.normalize(weight, half, Wide<T>{1}, i);
    for (int v = 0; v < g.kCount; ++v) add(x.a[v] * g.a[v] + x.b[v] * g.b[v]);
  });
  for_each_rest<T>(p.rotary_dim, p.head_dim, [&](auto lanes, int64_t i) {
    using U = decltype(lanes);
    add(read<U>(saved + i) * load<U>(weight + i) * read<U>(grad + i));
  });
  return products;
}

// dx = scale * (weight * g - normal * mean), where g is the gradient rotated back and normal is
// x * scale; mean is that of weight * g * normal.
template <typename T, bool Interleaved>
void norm_backward_row(const RopeParams& p, const T* grad, const T* saved, T* out,
                       CosSin<T> cos_sin, const Wide<T>* weight, Wide<T> scale, Wide<T> mean,
                       Wide<T>* weight_grad) {
  const int64_t half = p.rotary_dim / 2;
  const auto differentiate = [&](auto& g, auto normal, int64_t i) {
    using V = decltype(normal);
    store(weight_grad + i, load<V>(weight_grad + i) + g * normal);
    g = scale * (g * load<V>(weight + i) - normal * mean);
  };
  for_each_pairs<T, Interleaved>(half, [&](auto width, int64_t i) {
    Pairs<T, Interleaved, decltype(width)::value> g, x;
    g.load(grad, half, i);
    g.rotate(cos_sin.cos, cos_sin.sin, i);
    x.load(saved, half, i);
    for (int v = 0; v < g.kCount; ++v) {
      const int64_t at = i + v * g.kLanes;
      differentiate(g.a[v], x.a[v] * scale, at);
      differentiate(g.b[v], x.b[v] * scale, half + at);
    }
    g.store(out, half, i);
  });
  for_each_rest<T>(p.rotary_dim, p.head_dim, [&](auto lanes, int64_t i) {
    using V = decltype(lanes);
    V g = read<V>(grad + i);
    differentiate(g, read<V>(saved + i) * scale, i);
    write(out + i, g);
  });
}

// A tensor without weights: rotated, the dims past the pairs copied.
template <typename T, bool Interleaved>
void rotate_only(const RopeParams& p, const T* in, T* out, CosSin<T> cos_sin) {
  if (!out) return;
  rotate_row<T, Interleaved, false>({in, out, nullptr}, p.rotary_dim / 2, cos_sin.cos, cos_sin.sin,
                                    nullptr);
  if (in == out) return;
  std::memcpy(out + p.rotary_dim, in + p.rotary_dim, (p.head_dim - p.rotary_dim) * sizeof(T));
}

template <typename T>
constexpr int kGroup = Lanes<WideVector<T>>::count;

// The backward of one tensor of one block of tokens. Rows are read for their sums, then once more
// for their gradients: in groups whose sums over lanes cost little together, or, where all heads
// share a mean square, token by token.
template <typename T, bool Interleaved>
struct NormBackward {
  using V = WideVector<T>;
  struct Sums {
    V squares, products;
  };

  const RopeNormParams& p;
  const RopeTensor& x;
  const Norm<T>& norm;
  const Token<double>* tokens;
  const Scratch<T>& scratch;
  const PrefetchDistances& ahead;
  Wide<T>* weight_grad;
  Sums of_tokens[kBlock];  // where all heads share a mean square

  void add_row(int64_t t, int64_t head, Sums& sums) const {
    const T* in = input_row<T>(x, tokens[t], head);
    const T* saved = saved_row<T>(x, tokens[t], head);
    prefetch(in, ahead.in, ahead.bytes);
    prefetch(saved, ahead.saved, ahead.bytes);
    sums.squares += squares_of<0>(saved, p.head_dim);
    sums.products += products_of<T, Interleaved>(p, in, saved, {scratch, t},
                                                 &norm.weight[head * norm.head_step]);
  }

  // Of a row, or of a vector of rows: one over the root mean square, and the mean of products.
  template <typename U>
  struct ScaleAndMean {
    U scale, mean;
  };

  template <typename U>
  ScaleAndMean<U> scale_and_mean(U squares, U products) const {
    const Wide<T> share = Wide<T>{1} / static_cast<Wide<T>>(norm.heads_per_mean * p.head_dim);
    const U scale = Wide<T>{1} / root(squares * share + static_cast<Wide<T>>(p.norm_eps));
    return {scale, products * scale * share};
  }

  void write_row(int64_t t, int64_t head, Wide<T> scale, Wide<T> mean) const {
    const T* in = input_row<T>(x, tokens[t], head);
    T* out = output_row<T>(x, tokens[t], head);
    norm_backward_row<T, Interleaved>(p, in, saved_row<T>(x, tokens[t], head), out, {scratch, t},
                                      &norm.weight[head * norm.head_step], scale, mean,
                                      weight_grad + head * norm.head_step);
    if (in != out) prefetch(out, ahead.out, ahead.bytes);
  }

  void run_per_head(Run run) const {
    Cursor read(run), written(run);
    V squares[kGroup<T>] = {}, products[kGroup<T>] = {};
    for (int64_t left = run.tokens * run.heads; left > 0; left -= kGroup<T>) {
      const int64_t count = std::min<int64_t>(kGroup<T>, left);
      for (int64_t i = 0; i < count; ++i, read.next()) {
        Sums sums{};
        add_row(read.token, read.head, sums);
        squares[i] = sums.squares, products[i] = sums.products;
      }
      const auto [scale, mean] = scale_and_mean(sums_of(squares), sums_of(products));
      Wide<T> scales[kGroup<T>], means[kGroup<T>];
      store(scales, scale), store(means, mean);
      for (int64_t i = 0; i < count; ++i, written.next()) {
        write_row(written.token, written.head, scales[i], means[i]);
      }
    }
  }

  void run_all_heads(Run run) {
    ScaleAndMean<Wide<T>> shared;
    run.for_each_row([&](int64_t t, int64_t head) {
      if (run.of_heads && head == 0) {
        for (int64_t h = 0; h < run.heads; ++h) add_row(t, h, of_tokens[t]);
      }
      if (!run.of_heads || head == 0) {
        shared = scale_and_mean(sum_of(of_tokens[t].squares), sum_of(of_tokens[t].products));
      }
      write_row(t, head, shared.scale, shared.mean);
    });
  }

  template <typename EachRun>
  void run(const EachRun& each_run) {
    if (norm.head_step == 0) return each_run([&](Run run) { run_per_head(run); });
    each_run([&](Run run) {  // all sums first, where a token's heads do not lie together
      if (!run.of_heads) {
        run.for_each_row([&](int64_t t, int64_t h) { add_row(t, h, of_tokens[t]); });
      }
    });
    each_run([&](Run run) { run_all_heads(run); });
  }
};

// Calls block(n, tokens, count, each_run) for each tensor of each block of tokens, where
// each_run(visit) calls visit(Run) for its rows.
template <typename T, typename Block>
void for_each_tensor(const RopeParams& p, int64_t begin, int64_t end, Scratch<T>& scratch,
                     const Block& block) {
  for_each_block(p, begin, end, [&](const Token<double>* tokens, int64_t count) {
    for (int n = 0; n < p.num_tensors; ++n) {
      bool filled = n > 0 && !p.log_decay;
      block(n, tokens, count, [&](const auto& visit) {
        for_each_run<T>(p, p.tensors[n], tokens, count, scratch, filled, visit);
        filled = true;
      });
    }
  });
}

template <typename T, bool Interleaved>
void rotate_rows(const RopeParams& p, const RopeTensor& x, const Token<double>* tokens,
                 const Scratch<T>& scratch, Run run) {
  run.for_each_row([&](int64_t t, int64_t head) {
    rotate_only<T, Interleaved>(p, input_row<T>(x, tokens[t], head),
                                output_row<T>(x, tokens[t], head), {scratch, t});
  });
}

template <typename T, bool Interleaved>
void norm_tokens(const RopeNormParams& p, int64_t begin, int64_t end, const Norm<T>* norms,
                 Scratch<T>& scratch) {
  const auto block = [&](int n, const Token<double>* tokens, int64_t count, const auto& each_run) {
    const RopeTensor& x = p.tensors[n];
    const Norm<T>& norm = norms[n];
    const PrefetchDistances ahead(p, x, sizeof(T));
    if (norm.weight.empty()) {
      each_run([&](Run run) { rotate_rows<T, Interleaved>(p, x, tokens, scratch, run); });
    } else if (norm.head_step == 0) {
      each_run([&](Run run) {
        with_row_form<T>(p, x, [&](auto form) {
          using Norms = PerHeadNorm<T, Interleaved, decltype(form)>;
          Norms{p, x, norm.weight.data(), tokens, scratch, ahead}.norm_and_rotate(run);
        });
      });
    } else {
      with_row_form<T>(p, x, [&](auto form) {
        AllHeadsNorm<T, Interleaved, decltype(form)> all{p, x, norm, tokens, scratch, ahead, {}};
        if (!all.by_tokens()) all.measure(count);
        each_run([&](Run run) { all.norm_and_rotate(run); });
      });
    }
  };
  for_each_tensor(p, begin, end, scratch, block);
  if (streams_any_output<T>(p)) fence_streaming_stores();
}

template <typename T, bool Interleaved>
void norm_tokens_backward(const RopeNormParams& p, int64_t begin, int64_t end, const Norm<T>* norms,
                          Scratch<T>& scratch, Buffer<Wide<T>>* weight_grads) {
  const auto block = [&](int n, const Token<double>* tokens, int64_t, const auto& each_run) {
    const RopeTensor& x = p.tensors[n];
    if (norms[n].weight.empty()) {
      each_run([&](Run run) { rotate_rows<T, Interleaved>(p, x, tokens, scratch, run); });
    } else {
      const PrefetchDistances ahead(p, x, sizeof(T));
      Wide<T>* grads = weight_grads[n].data();
      NormBackward<T, Interleaved>{p, x, norms[n], tokens, scratch, ahead, grads, {}}.run(each_run);
    }
  };
  for_each_tensor(p, begin, end, scratch, block);
}

template <typename T, bool Interleaved>
void run_layout(const RopeNormParams& p, int64_t begin, int64_t end) {
  const auto order = [&](Wide<T>* row) { order_dims<T, Interleaved>(row, p.rotary_dim / 2); };
  const Norm<T> norms[2] = {{p.norms[0], p.tensors[0], p.head_dim, order},
                            {p.norms[1], p.tensors[1], p.head_dim, order}};
  if (p.norm_part_tokens == 0) {
    Scratch<T> scratch(p, end - begin);
    return norm_tokens<T, Interleaved>(p, begin, end, norms, scratch);
  }
  Scratch<T> scratch(p, kBlock);
  const auto dims = ordered_dims<T, Interleaved>(p.head_dim, p.rotary_dim / 2);
  Buffer<Wide<T>> grads[2];
  for (int64_t part = begin; part < end; ++part) {
    for (int n = 0; n < 2; ++n) grads[n].assign(norms[n].weight.size(), 0);
    const int64_t first = part * p.norm_part_tokens;
    const int64_t last = std::min(first + p.norm_part_tokens, p.batch * p.seqlen);
    norm_tokens_backward<T, Interleaved>(p, first, last, norms, scratch, grads);
    for (int n = 0; n < 2; ++n) {
      Wide<T>* to = static_cast<Wide<T>*>(p.norm_parts[n]) + part * p.norm_part_stride;
      const int64_t weights = grads[n].size();
      for (int64_t row = 0; row < weights; row += p.head_dim) {
        for (int64_t i = 0; i < p.head_dim; ++i) to[row + dims[i]] = grads[n][row + i];
      }
    }
  }
}

template <typename T>
void run(const RopeNormParams& p, int64_t begin, int64_t end) {
  p.interleaved ? run_layout<T, true>(p, begin, end) : run_layout<T, false>(p, begin, end);
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
