// The merge of attention over three sets of keys.
#include <cmath>

#include "cpu/merge/kernel.h"
#include "cpu/runtime/threads.h"
#include "driver.h"

namespace extrope {
namespace {

constexpr int64_t kSets = 3, kBatch = 2, kSeqlen = 37, kHeads = 3;

// A third of the rows have no keys in a set.
template <typename Lse>
std::vector<Lse> log_sum_exps(uint64_t seed) {
  std::vector<Lse> lses = random_values<Lse>(kBatch * kHeads * kSeqlen, seed);
  Random random(seed + 1);
  for (Lse& lse : lses) lse = random.below(3) ? 8 * lse : -INFINITY;
  return lses;
}

template <typename T, typename First, typename Lse>
void run(const std::string& name, int64_t head_dim, bool in_place) {
  const int64_t head = head_dim, seq = kHeads * head, batch = kSeqlen * seq;
  std::vector<First> first = random_values<First>(kBatch * batch, head_dim);
  std::vector<First> out(first.size());
  std::vector<T> others[kSets - 1];
  std::vector<Lse> lses[kSets], lse(kBatch * kHeads * kSeqlen);
  MergeRows sets[kSets];
  for (int64_t n = 0; n < kSets; ++n) {
    lses[n] = log_sum_exps<Lse>(100 + n);
    if (n > 0) others[n - 1] = random_values<T>(kBatch * batch, head_dim + n);
    void* rows = n == 0 ? static_cast<void*>(first.data()) : others[n - 1].data();
    sets[n] = {rows,
               batch,
               seq,
               head,
               n == 0 ? dtype<First>() : dtype<T>(),
               lses[n].data(),
               kHeads * kSeqlen,
               kSeqlen,
               1};
  }
  MergeParams p{};
  p.sets = sets, p.num_sets = kSets, p.in_place = in_place;
  p.merged = sets[0];
  if (!in_place) p.merged.out = out.data(), p.merged.lse = lse.data();
  p.lse_is_f64 = std::is_same_v<Lse, double>;
  p.wide = p.lse_is_f64 || std::is_same_v<First, double>;
  p.batch = kBatch, p.seqlen = kSeqlen, p.heads = kHeads, p.head_dim = head_dim;
  share_out(kBatch * kSeqlen, kBytesPerThread / 8, [&](int64_t begin, int64_t end) {
    EXTROPE_EXPAND(merge_tokens_, EXTROPE_ISA)(p, begin, end);
  });
  std::vector<Lse>& joint = in_place ? lses[0] : lse;
  for (Lse& x : joint) x = std::isinf(x) ? -1000 : x;  // differences are taken of numbers
  const std::string which = "merge/" + name + "/" + std::to_string(head_dim);
  write(which, in_place ? first : out);
  write(which + "/lse", joint);
}

}  // namespace

void run_merge() {
  for (int64_t head_dim : {64, 70}) {
    each_type([&](auto zero, const std::string& name) {
      using T = decltype(zero);
      run<T, T, float>(name, head_dim, false);
      run<T, float, float>("in_place_of_float32/" + name, head_dim, true);
    });
    run<double, double, float>("float64", head_dim, false);
    run<bf16, bf16, double>("bfloat16_by_float64", head_dim, false);
  }
}

}  // namespace extrope
