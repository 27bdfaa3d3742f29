// Tokens appended to a cache, and attention of a few queries over it.
#include "cpu/decode/run.h"
#include "driver.h"
#include "regions.h"

namespace extrope {
namespace {

constexpr int64_t kPad = 16;  // frequencies, of whole vectors
constexpr int64_t kBatch = 2, kHeadsQ = 6, kHeadsK = 2, kCapacity = 640, kPage = 16;
constexpr int32_t kSeqlens[kBatch] = {601, 37}, kLeftpad[kBatch] = {3, 0};
constexpr decode::Kernels kKernels{EXTROPE_EXPAND(append_tokens_, EXTROPE_ISA),
                                   EXTROPE_EXPAND(decode_splits_, EXTROPE_ISA),
                                   EXTROPE_EXPAND(merge_splits_, EXTROPE_ISA)};

struct Case {
  const char* name;
  Regions regions;
  int64_t seqlen_q, head_dim, half;
  bool interleaved, paged, leftpad, log_n;
};

Regions stored_as_seen(Regions regions) {
  regions.stored = regions.at[0].k_map;
  return regions;
}

const Case kCases[] = {
    {"rope", stored_as_seen(rope()), 1, 64, 32, false, false, false, false},
    {"rope_paged", stored_as_seen(rope()), 3, 128, 64, false, true, true, false},
    {"rerope", stored_as_seen(rerope(100)), 1, 128, 64, false, false, true, true},
    {"rerope_gptj", stored_as_seen(rerope(100)), 2, 72, 20, true, true, false, false},
    {"self_extend", stored_as_seen(self_extend(64, 4)), 1, 64, 32, false, true, false, false},
};

// Pages of a sequence lie in any order; without pages, sequence after sequence.
KVCache cache_of(const Case& c, DType dtype, void* k, void* v, const int32_t* pages) {
  const int64_t slot = kHeadsK * c.head_dim, block = (c.paged ? kPage : kCapacity) * slot;
  KVCache cache{};
  cache.dtype = dtype;
  cache.k = {k, block, slot, c.head_dim}, cache.v = {v, block, slot, c.head_dim};
  cache.batch = kBatch, cache.heads = kHeadsK;
  cache.head_dim = cache.head_dim_v = c.head_dim;
  cache.capacity = cache.page_size = kCapacity;
  if (c.paged) {
    cache.block_table = pages, cache.table_batch = kCapacity / kPage, cache.page_size = kPage;
  }
  cache.seqlens = kSeqlens, cache.leftpad = c.leftpad ? kLeftpad : nullptr;
  cache.appended = c.seqlen_q;
  return cache;
}

template <typename T>
void run(const Case& c, const std::string& name) {
  const int64_t slot = kHeadsK * c.head_dim, row = kHeadsQ * c.head_dim;
  std::vector<T> k_cache = random_values<T>(kBatch * kCapacity * slot, 41);
  std::vector<T> v_cache = random_values<T>(kBatch * kCapacity * slot, 42);
  std::vector<T> k = random_values<T>(kBatch * c.seqlen_q * slot, 43);
  std::vector<T> v = random_values<T>(kBatch * c.seqlen_q * slot, 44);
  const std::vector<T> q = random_values<T>(kBatch * c.seqlen_q * row, 45);
  constexpr int32_t kPages = kBatch * kCapacity / kPage;
  std::vector<int32_t> pages(kPages);
  for (int32_t i = 0; i < kPages; ++i) pages[i] = i * 7 % kPages;
  const std::vector<double> inv_freq = frequencies(c.half, (c.half + kPad - 1) / kPad * kPad);

  DecodeParams p{};
  p.cache = cache_of(c, dtype<T>(), k_cache.data(), v_cache.data(), pages.data());
  p.freqs = {inv_freq.data(), nullptr, c.half, 0, c.interleaved};
  p.regions = c.regions;
  p.q = q.data(), p.q_batch = c.seqlen_q * row, p.q_seq = row, p.q_head = c.head_dim;
  p.seqlen_q = c.seqlen_q, p.heads_q = kHeadsQ;
  p.scale = 0.25, p.log_n = c.log_n ? 64.0 : 0.0, p.amplitude = 1.0625;
  std::vector<T> out(q.size());
  std::vector<float> lse(kBatch * kHeadsQ * c.seqlen_q);
  p.out = out.data(), p.lse = lse.data();

  const auto plane = [&](std::vector<T>& x) {
    return Plane{x.data(), c.seqlen_q * slot, slot, c.head_dim};
  };
  decode::run_append({p.cache, p.freqs, p.regions.stored, plane(k), plane(v)}, kKernels);
  decode::run_decode(p, kKernels);
  write(name + "/k_cache", k_cache);
  write(name + "/v_cache", Moved<T>{v_cache});
  write(name + "/out", out);
  write(name + "/lse", lse);
}

}  // namespace

void run_decode() {
  for (const Case& c : kCases) {
    each_type([&](auto zero, const char* type) {
      run<decltype(zero)>(c, std::string("decode/") + c.name + "/" + type);
    });
  }
}

}  // namespace extrope
