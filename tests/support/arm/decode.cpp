// Tokens appended to a cache, and attention of a few queries over it.
#include "one_isa.h"
// Behind it.
#include "cpu/decode/run.h"
#include "driver.h"
#include "regions.h"

namespace extrope {
namespace {

constexpr int64_t kPad = 16;  // frequencies, of whole vectors
constexpr int64_t kBatch = 2, kHeadsQ = 6, kHeadsK = 2, kCapacity = 640, kPage = 16;
constexpr int32_t kSeqlens[kBatch] = {601, 37}, kLeftpad[kBatch] = {3, 0};
constexpr decode::DecodeKernels kKernels{EXTROPE_EXPAND(decode_splits_, EXTROPE_ISA),
                                         EXTROPE_EXPAND(merge_splits_, EXTROPE_ISA)};

struct Case {
  const char* name;
  Regions regions;
  int64_t seqlen_q, head_dim, half;
  bool interleaved, paged, leftpad;
  bool softmax_options = false;  // a cap, sinks, a sliding window and temperatures
  int64_t head_dim_v = head_dim;
};

Regions stored_as_seen(Regions regions) {
  regions.stored = regions.at[0].k_map;
  return regions;
}

const Case kCases[] = {
    {"rope", stored_as_seen(rope()), 1, 64, 32, false, false, false},
    {"rope_paged", stored_as_seen(rope()), 3, 128, 64, false, true, true},
    {"rerope", stored_as_seen(rerope(100)), 1, 128, 64, false, false, true},
    {"rerope_gptj", stored_as_seen(rerope(100)), 2, 72, 20, true, true, false},
    {"self_extend", stored_as_seen(self_extend(64, 4)), 1, 64, 32, false, true, false},
    {"by_pair", stored_as_seen(groups_by_pair()), 2, 72, 32, false, true, true},
    {"by_pair_raw", groups_by_pair(), 1, 64, 32, false, false, false},
    {"capped", stored_as_seen(rerope(100)), 3, 64, 32, false, true, false, true, 40},
};

// Pages of a sequence lie in any order; without pages, sequence after sequence.
KVCache cache_of(const Case& c, DType dtype, void* k, void* v, const int32_t* pages) {
  const auto plane = [&](void* data, int64_t head_dim) {
    const int64_t slot = kHeadsK * head_dim;
    return Plane{data, (c.paged ? kPage : kCapacity) * slot, slot, head_dim};
  };
  KVCache cache{};
  cache.dtype = dtype;
  cache.k = plane(k, c.head_dim), cache.v = plane(v, c.head_dim_v);
  cache.batch = kBatch, cache.heads = kHeadsK;
  cache.head_dim = c.head_dim, cache.head_dim_v = c.head_dim_v;
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
  const int64_t row = kHeadsQ * c.head_dim, dims = kHeadsK * c.head_dim;
  const int64_t dims_v = kHeadsK * c.head_dim_v;
  std::vector<T> k_cache = random_values<T>(kBatch * kCapacity * dims, 41);
  std::vector<T> v_cache = random_values<T>(kBatch * kCapacity * dims_v, 42);
  std::vector<T> k = random_values<T>(kBatch * c.seqlen_q * dims, 43);
  std::vector<T> v = random_values<T>(kBatch * c.seqlen_q * dims_v, 44);
  const std::vector<T> q = random_values<T>(kBatch * c.seqlen_q * row, 45);
  constexpr int32_t kPages = kBatch * kCapacity / kPage;
  std::vector<int32_t> pages(kPages);
  for (int32_t i = 0; i < kPages; ++i) pages[i] = i * 7 % kPages;
  const std::vector<double> inv_freq = frequencies(c.half, (c.half + kPad - 1) / kPad * kPad);

  DecodeParams p{};
  p.cache = cache_of(c, dtype<T>(), k_cache.data(), v_cache.data(), pages.data());
  p.freqs = {inv_freq.data(),
             nullptr,
             c.half,
             static_cast<int64_t>(inv_freq.size()),
             0,
             c.interleaved,
             (c.head_dim - 2 * c.half) / 8 * 8};
  p.regions = c.regions;
  p.q = q.data(), p.q_stride_batch = c.seqlen_q * row, p.q_stride_seq = row,
  p.q_stride_head = c.head_dim;
  p.seqlen_q = c.seqlen_q, p.heads_q = kHeadsQ;
  p.softmax_scale = 0.25, p.amplitude = 1.0625;
  const std::vector<float> factors = random_values<float>(kBatch * c.seqlen_q + kHeadsQ, 46);
  if (c.softmax_options) {
    p.regions.sliding_window = 150, p.softcap = 12.0f;
    p.query_scale = {factors.data(), c.seqlen_q, 1};
    p.sinks = {factors.data() + kBatch * c.seqlen_q, 1};
  }
  std::vector<T> out(kBatch * c.seqlen_q * kHeadsQ * c.head_dim_v);
  std::vector<float> lse(kBatch * kHeadsQ * c.seqlen_q);
  p.out = out.data(), p.lse = lse.data();

  const auto plane = [&](std::vector<T>& x, int64_t head_dim) {
    const int64_t slot = kHeadsK * head_dim;
    return Plane{x.data(), c.seqlen_q * slot, slot, head_dim};
  };
  const Plane of_k = plane(k, c.head_dim), of_v = plane(v, c.head_dim_v);
  decode::run_append(p, nullptr, of_k, of_v);
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
