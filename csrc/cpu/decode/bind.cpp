// Registers the CPU kernel for attention over a key/value cache, and cuts its work for the threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/decode/kernels.h"
#include "cpu/runtime/capability.h"

namespace extrope {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kRows = 64;    // query rows of a head of k that share one reading of the cache
constexpr int64_t kSplit = 256;  // keys of a part
constexpr int64_t kFewScores = 4'096;  // below it a second thread costs more than it saves
constexpr int64_t kPad = 16;           // lanes of the widest vector

struct Kernels {
  void (*decode)(const DecodeParams&, const DecodePart*, int64_t);
  void (*merge)(const DecodeParams&, const DecodeRows*, int64_t);
};

#define EXTROPE_KERNELS(isa) \
  Kernels { decode_parts_##isa, merge_parts_##isa }

// A head_dim is a multiple of 8, and the kernels read rows in whole vectors.
Kernels kernels(int64_t head_dim) {
#if defined(__x86_64__)
  if (capability() >= kAvx512 && head_dim % 16 != 0) return EXTROPE_KERNELS(avx2);
#endif
  return EXTROPE_WIDEST(EXTROPE_KERNELS);
}

CachePlane plane(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

const int32_t* ints(const Tensor& x) { return static_cast<const int32_t*>(x.data_ptr()); }

std::vector<double> frequencies(DecodeParams& p, const Tensor& inv_freq) {
  const int64_t rows = inv_freq.dim() == 2 ? inv_freq.size(0) : 1;
  const int64_t step = inv_freq.dim() == 2 ? inv_freq.stride(0) : 0;
  p.half = inv_freq.size(inv_freq.dim() - 1);
  p.freq_stride = (p.half + kPad - 1) / kPad * kPad;
  p.freq_batch = rows > 1 ? p.freq_stride : 0;
  std::vector<double> padded(rows * p.freq_stride);
  for (int64_t row = 0; row < rows; ++row) {
    double* out = &padded[row * p.freq_stride];
    if (inv_freq.scalar_type() == ScalarType::Double) {
      std::copy_n(static_cast<const double*>(inv_freq.data_ptr()) + row * step, p.half, out);
    } else {
      std::copy_n(static_cast<const float*>(inv_freq.data_ptr()) + row * step, p.half, out);
    }
  }
  p.inv_freq = padded.data();
  return padded;
}

// The parts depend on the lengths alone, not on the threads: neither does the result.
std::vector<DecodeRows> cut(const DecodeParams& p, const int32_t* seqlens, const int32_t* leftpad,
                            int64_t appended) {
  const int64_t tokens = std::max<int64_t>(1, kRows / (p.heads_q / p.heads_k));
  const int64_t chunks = (p.seqlen_q + tokens - 1) / tokens;
  std::vector<DecodeRows> all;
  int64_t partial = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t slot = leftpad ? leftpad[b] : 0;
    const int64_t length = std::max<int64_t>(seqlens[b] + appended - slot, 0);
    for (int64_t first = 0; first < p.seqlen_q; first += tokens) {
      const int64_t last = std::min(first + tokens, p.seqlen_q);
      const int64_t keys = std::max<int64_t>(length - p.seqlen_q + last, 0);
      const int64_t split = kSplit * chunks, parts = (keys + split - 1) / split;
      all.push_back({b, first, last, slot, length, split, parts, partial});
      partial += parts * (last - first) * p.heads_q;
    }
  }
  return all;
}

void launch(DecodeParams& p, const std::vector<DecodeRows>& rows) {
  std::vector<DecodePart> parts;
  int64_t partials = 0, scores = 0;
  for (const DecodeRows& r : rows) {
    const int64_t count = (r.last_token - r.first_token) * p.heads_q;
    partials += r.parts * count;
    scores += r.length * count;
    for (int64_t n = 0; n < r.parts; ++n) parts.push_back({&r, n});
  }
  const std::unique_ptr<float[]> partial(new float[partials * (p.head_dim + 2)]);
  p.partial = partial.get();
  const Kernels run = kernels(p.head_dim);
  const int64_t all = parts.size(), merges = rows.size();
  if (scores <= kFewScores) {
    run.decode(p, parts.data(), all);
    run.merge(p, rows.data(), merges);
    return;
  }
  torch::stable::parallel_for(0, all, 1, [&](int64_t begin, int64_t end) {
    run.decode(p, parts.data() + begin, end - begin);
  });
  torch::stable::parallel_for(0, merges, 1, [&](int64_t begin, int64_t end) {
    run.merge(p, rows.data() + begin, end - begin);
  });
}

// The arguments come checked by kvcache_arguments.py; factor is infinite for raw keys, log_n 0 for
// none, amplitude that of q and k together.
std::tuple<Tensor, Tensor> decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor inv_freq,
                                  Tensor cache_seqlens, OptionalTensor block_table,
                                  OptionalTensor cache_leftpad, int64_t appended, int64_t window,
                                  double factor, bool grouped, double scale, double log_n,
                                  double amplitude, bool interleaved) {
  constexpr double kLog2E = 1.4426950408889634;
  DecodeParams p{};
  p.dtype = q.scalar_type() == ScalarType::Float      ? DType::f32
            : q.scalar_type() == ScalarType::BFloat16 ? DType::bf16
                                                      : DType::f16;
  p.q = q.data_ptr();
  p.q_batch = q.stride(0), p.q_seq = q.stride(1), p.q_head = q.stride(2);
  p.batch = q.size(0), p.seqlen_q = q.size(1), p.heads_q = q.size(2), p.head_dim = q.size(3);
  p.k = plane(k_cache), p.v = plane(v_cache);
  p.heads_k = k_cache.size(2);
  p.page_size = k_cache.size(1);
  if (block_table) p.block_table = ints(*block_table), p.table_batch = block_table->stride(0);
  p.interleaved = interleaved;
  p.window = window, p.factor = factor, p.grouped = grouped;
  p.scale = scale * kLog2E, p.log_n = log_n, p.amplitude = amplitude;
  const std::vector<double> padded = frequencies(p, inv_freq);

  Tensor out = torch::stable::new_empty(q, {p.batch, p.seqlen_q, p.heads_q, p.head_dim});
  Tensor lse = torch::stable::new_empty(q, {p.batch, p.heads_q, p.seqlen_q}, ScalarType::Float);
  p.out = out.data_ptr();
  p.lse = static_cast<float*>(lse.data_ptr());
  launch(p, cut(p, ints(cache_seqlens), cache_leftpad ? ints(*cache_leftpad) : nullptr, appended));
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(extrope, CPU, m) { m.impl("cpu_decode", TORCH_BOX(&decode)); }

}  // namespace extrope
