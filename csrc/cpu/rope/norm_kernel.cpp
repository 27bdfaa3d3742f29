// RMSNorm and the rotation in one pass, forward and backward. Compiled once per instruction set,
// with EXTROPE_ISA as its name.
//
// R rotates a row and multiplies it by the amplitude, which under xPos depends on the position. The
// mean is over the dims of a head, or of all heads of a token:
//
//   scale = 1 / sqrt(mean(x**2) + eps)          y = R (x * scale * weight)
//
// Backward, with g = R^T dy (minus R's angle, its amplitude) and normal = x * scale:
//
//   dx = scale * (g * weight - normal * mean(g * weight * normal))
//   dweight = sum of g * normal over tokens, and over the heads that share the weights
//
// Without weights a tensor is rotated only.
//
// A row is read for its mean square, and again, from the first-level cache, to be rotated. If all
// heads of a token share a mean square and are not contiguous, a whole block of tokens is read
// before it is rotated; the second read is from the second-level cache.
//
// Types of the headers, beside those that rope_kernel.cpp lists:
//   Norm            one tensor's weights. head_step 0: heads share them, and each has a mean square
//                   of its own (PerHeadNorm). Else every head has its own weights, and all heads of
//                   a token share a mean square (AllHeadsNorm)
//   Pairs           a and b, the first and the second dims of some pairs, in vectors
//   WeightedCosSin  cosines and sines of a token, times the weights
//   WeightGrad      dweight of a tensor, summed over some rows, then over all
// Weights and their gradients are in the order of order_dims(), as one vector's pairs need them.

#include "cpu/rope/kernel.h"
#include "cpu/rope/norm_all_heads.h"
#include "cpu/rope/norm_backward.h"
#include "cpu/rope/norm_per_head.h"

namespace extrope {
namespace {

// Rotates a row without weights, and copies its other dims.
template <typename T, bool Interleaved>
void rotate_only(const RopeParams& p, const T* in, T* out, TokenCosSin<T> cos_sin) {
  if (!out) return;
  rotate_row<T, Interleaved, false>({in + p.rotary_offset, out + p.rotary_offset, nullptr},
                                    p.rotary_dim / 2, cos_sin.cos, cos_sin.sin, nullptr);
  if (in != out) copy_rest(p, in, out);
}

// Calls block(n, tokens, count, each_run) for each tensor of each block of tokens; each_run(visit)
// calls visit(Run) for its rows.
template <typename T, typename Block>
void for_each_tensor(const RopeParams& p, int64_t begin, int64_t end, AngleScratch<T>& scratch,
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
                 const AngleScratch<T>& scratch, Run run) {
  run.for_each_row([&](int64_t t, int64_t head) {
    rotate_only<T, Interleaved>(p, input_row<T>(x, tokens[t], head),
                                output_row<T>(x, tokens[t], head), {scratch, t});
  });
}

template <typename T, bool Interleaved>
void norm_tokens(const RopeNormParams& p, int64_t begin, int64_t end, const Norm<T>* norms,
                 AngleScratch<T>& scratch) {
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
                          AngleScratch<T>& scratch, WeightGrad<T>* weight_grads) {
  const auto block = [&](int n, const Token<double>* tokens, int64_t, const auto& each_run) {
    const RopeTensor& x = p.tensors[n];
    if (norms[n].weight.empty()) {
      each_run([&](Run run) { rotate_rows<T, Interleaved>(p, x, tokens, scratch, run); });
    } else {
      const PrefetchDistances ahead(p, x, sizeof(T));
      NormBackward<T, Interleaved>{p, x, norms[n], tokens, scratch, ahead, weight_grads[n]}.run(
          each_run);
    }
  };
  for_each_tensor(p, begin, end, scratch, block);
}

template <typename T, bool Interleaved>
void run_layout(const RopeNormParams& p, int64_t begin, int64_t end) {
  const auto order = [&](Wide<T>* row) { order_dims<T, Interleaved>(p, row); };
  const Norm<T> norms[2] = {{p.norms[0], p.tensors[0], p.head_dim, order},
                            {p.norms[1], p.tensors[1], p.head_dim, order}};
  if (p.norm_part_tokens == 0) {
    AngleScratch<T> scratch(p, end - begin);
    return norm_tokens<T, Interleaved>(p, begin, end, norms, scratch);
  }
  AngleScratch<T> scratch(p, kBlock);
  const auto dims = ordered_dims<T, Interleaved>(p);
  WeightGrad<T> weight_grads[2];
  for (int64_t part = begin; part < end; ++part) {
    for (int n = 0; n < 2; ++n) weight_grads[n].start(norms[n]);
    const int64_t first = part * p.norm_part_tokens;
    const int64_t last = std::min(first + p.norm_part_tokens, p.batch * p.seqlen);
    norm_tokens_backward<T, Interleaved>(p, first, last, norms, scratch, weight_grads);
    for (int n = 0; n < 2; ++n) {
      Wide<T>* to = static_cast<Wide<T>*>(p.norm_parts[n]) + part * p.norm_part_stride;
      const Buffer<Wide<T>>& grad = weight_grads[n].end();
      const int64_t weights = grad.size();
      for (int64_t row = 0; row < weights; row += p.head_dim) {
        for (int64_t i = 0; i < p.head_dim; ++i) to[row + dims[i]] = grad[row + i];
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
