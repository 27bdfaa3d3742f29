// The CPU kernels of `decode` and `append`, and how their work is cut for the threads.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/decode/args.h"
#include "cpu/decode/kernels.h"
#include "cpu/runtime/capability.h"
#include "cpu/runtime/output_pages.h"
#include "cpu/runtime/threads.h"

namespace extrope {
namespace decode {
namespace {

constexpr int64_t kBlockM = 64;  // query rows of a head of k that share one reading of the cache
constexpr int64_t kSplitSize = 256;    // keys
constexpr int64_t kFewScores = 4'096;  // below it a second thread costs more than it saves

struct Kernels {
  void (*append)(const AppendParams&, int64_t, int64_t);
  void (*decode)(const DecodeParams&, const Split*, int64_t);
  void (*merge)(const DecodeParams&, const QueryBlock*, int64_t);
};

#define EXTROPE_KERNELS(isa) \
  Kernels { append_tokens_##isa, decode_splits_##isa, merge_splits_##isa }

// A head_dim is a multiple of 8, and the kernels read rows in whole vectors.
Kernels kernels(int64_t head_dim) {
#if defined(__x86_64__)
  if (capability() >= kAvx512 && head_dim % 16 != 0) return EXTROPE_KERNELS(avx2);
#endif
  return EXTROPE_WIDEST(EXTROPE_KERNELS);
}

// The splits depend on the lengths alone, not on the threads: neither does the result.
std::vector<QueryBlock> cut(const DecodeParams& p) {
  const int64_t tokens = std::max<int64_t>(1, kBlockM / (p.heads_q / p.cache.heads));
  const int64_t split_size = kSplitSize * ((p.seqlen_q + tokens - 1) / tokens);
  std::vector<QueryBlock> all;
  int64_t partial = 0;
  for (int64_t b = 0; b < p.cache.batch; ++b) {
    const int64_t first_slot = p.cache.first_slot(b);
    const int64_t length = std::max<int64_t>(p.cache.end(b) - first_slot, 0);
    for (int64_t first = 0; first < p.seqlen_q; first += tokens) {
      const int64_t last = std::min(first + tokens, p.seqlen_q), before = length - p.seqlen_q;
      const int64_t first_key = p.regions.start(0, before + first);
      const int64_t keys = std::max<int64_t>(before + last - first_key, 0);
      const int64_t splits = (keys + split_size - 1) / split_size;
      all.push_back({b, first, last, first_slot, length, first_key, split_size, splits, partial});
      partial += splits * (last - first) * p.heads_q;
    }
  }
  return all;
}

void run_append(const AppendParams& p) {
  const KVCache& cache = p.cache;
  const Kernels run = kernels(cache.head_dim);
  const int64_t bytes = 2 * cache.heads * cache.head_dim * (cache.dtype == DType::f32 ? 4 : 2);
  share_out(cache.batch * cache.appended, bytes,
            [&](int64_t begin, int64_t end) { run.append(p, begin, end); });
}

void run_decode(DecodeParams& p) {
  const std::vector<QueryBlock> blocks = cut(p);
  std::vector<Split> splits;
  int64_t partials = 0, scores = 0;
  for (const QueryBlock& block : blocks) {
    const int64_t rows = (block.last_token - block.first_token) * p.heads_q;
    partials += block.num_splits * rows;
    scores += (block.length - block.first_key) * rows;
    for (int64_t n = 0; n < block.num_splits; ++n) splits.push_back({&block, n});
  }
  const std::unique_ptr<float[]> partial(new float[partials * (p.cache.head_dim + 2)]);
  p.partial = partial.get();
  const Kernels run = kernels(p.cache.head_dim);
  const int64_t all = splits.size(), merges = blocks.size();
  if (scores <= kFewScores) {
    run.decode(p, splits.data(), all);
    run.merge(p, blocks.data(), merges);
    return;
  }
  torch::stable::parallel_for(0, all, 1, [&](int64_t begin, int64_t end) {
    run.decode(p, splits.data() + begin, end - begin);
  });
  torch::stable::parallel_for(0, merges, 1, [&](int64_t begin, int64_t end) {
    run.merge(p, blocks.data() + begin, end - begin);
  });
}

std::tuple<Tensor, Tensor> decode(Tensor q, Tensor k_cache, Tensor v_cache, OptionalTensor k,
                                  OptionalTensor v, Tensor inv_freq, Tensor cache_seqlens,
                                  OptionalTensor block_table, OptionalTensor cache_leftpad,
                                  OptionalTensor log_decay, std::vector<int64_t> starts,
                                  int64_t granularity, std::vector<double> maps,
                                  std::optional<double> softmax_scale, std::optional<double> log_n,
                                  double attention_factor, bool interleaved) {
  constexpr const char* op = "decode";
  constexpr double kLog2E = 1.4426950408889634;
  const CacheArgs args{
      op,          k_cache,       v_cache,   k,          v, inv_freq, cache_seqlens,
      block_table, cache_leftpad, log_decay, interleaved};
  DecodeParams p{};
  p.cache = cache_of(args, q);
  p.q = q.data_ptr();
  p.q_batch = q.stride(0), p.q_seq = q.stride(1), p.q_head = q.stride(2);
  p.seqlen_q = q.size(1), p.heads_q = q.size(2);
  require_of(op, p.cache.heads > 0 && p.heads_q % p.cache.heads == 0,
             "k_cache's heads must divide q's ", p.heads_q, " heads, got ", p.cache.heads);
  const FrequencyRows freqs = frequencies_of(args, p.cache);
  p.freqs = freqs.params;
  p.regions = regions_of(op, starts, granularity, maps);
  for (int64_t r = 0; r < p.regions.count; ++r) {
    require_of(op, !log_decay.has_value() || p.regions.at[r].k_map == p.regions.stored,
               "log_decay (XPOS) needs keys that are stored as every region sees them");
  }
  p.scale = softmax_scale_of(op, softmax_scale, p.cache.head_dim) * kLog2E;
  check_scales(op, log_n, attention_factor);
  p.log_n = log_n.value_or(0.0);
  p.amplitude = attention_factor * attention_factor;

  if (k.has_value()) run_append({p.cache, p.freqs, p.regions.stored, plane(*k), plane(*v)});
  const Tensor out =
      fresh({p.cache.batch, p.seqlen_q, p.heads_q, p.cache.head_dim}, q.scalar_type());
  const Tensor lse = fresh({p.cache.batch, p.heads_q, p.seqlen_q}, ScalarType::Float);
  p.out = out.data_ptr();
  p.lse = static_cast<float*>(lse.data_ptr());
  if (lse.numel() > 0) run_decode(p);
  return {out, lse};
}

void append(Tensor k_cache, Tensor v_cache, Tensor k, Tensor v, Tensor inv_freq,
            Tensor cache_seqlens, OptionalTensor block_table, OptionalTensor cache_leftpad,
            OptionalTensor log_decay, std::vector<double> stored, bool interleaved) {
  constexpr const char* op = "append";
  const OptionalTensor new_k = k, new_v = v;
  const CacheArgs args{op,         k_cache,       v_cache,     new_k,         new_v,
                       inv_freq,   cache_seqlens, block_table, cache_leftpad, log_decay,
                       interleaved};
  const KVCache cache = cache_of(args, k);
  require_of(op, stored.size() == kMapNumbers, "stored must be ", kMapNumbers, " numbers, got ",
             stored.size());
  const FrequencyRows freqs = frequencies_of(args, cache);
  run_append({cache, freqs.params, map_of(stored.data()), plane(k), plane(v)});
}

}  // namespace
}  // namespace decode

STABLE_TORCH_LIBRARY_IMPL(extrope, CPU, m) {
  m.impl("decode", TORCH_BOX(&decode::decode));
  m.impl("append", TORCH_BOX(&decode::append));
}

}  // namespace extrope
