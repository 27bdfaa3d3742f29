// Scans of decayed linear attention: the forward, and the forms that its gradients take.
#include "cpu/linear_attention/run.h"
#include "driver.h"
#include "random_cycles.h"

namespace extrope {
namespace {

constexpr int64_t kBatch = 2, kSeqlen = 150, kHeads = 3, kScoreDim = 40, kValueDim = 24;
constexpr ScanKernels kKernels{
    EXTROPE_EXPAND(scan_plan_, EXTROPE_ISA), EXTROPE_EXPAND(scan_chunk_, EXTROPE_ISA),
    EXTROPE_EXPAND(scan_convert_, EXTROPE_ISA), EXTROPE_EXPAND(scan_dots_, EXTROPE_ISA)};
constexpr float kDecay[kHeads] = {1.0f, 0.96875f, 0.875f};
constexpr int32_t kBoundaries[] = {0, 33, 33, 150};

struct Case {
  const char* name;
  bool permuted, packed, phi_scores, causal, reverse, normalize, numbers, state;
};

constexpr Case kCases[] = {
    {"causal", false, false, true, true, false, true, false, true},
    {"permuted", true, false, true, true, false, true, false, false},
    {"packed", true, true, true, true, false, true, false, true},
    {"all_keys", false, false, true, false, false, true, false, false},
    {"dq", false, false, false, true, false, false, true, false},
    {"dk", false, false, false, true, true, false, true, false},
};

template <typename T>
ScanTensor view(const Case& c, const std::vector<T>& x, int64_t dim) {
  const int64_t seq = kHeads * dim;
  return {const_cast<T*>(x.data()), c.packed ? 0 : kSeqlen * seq, seq, dim, kHeads};
}

template <typename T>
void run(const Case& c, const std::string& name) {
  const int64_t batch = c.packed ? 1 : kBatch, rows = batch * kSeqlen * kHeads;
  const int64_t sequences = c.packed ? std::size(kBoundaries) - 1 : batch;
  const std::vector<T> q = random_values<T>(rows * kScoreDim, 51);
  const std::vector<T> k = random_values<T>(rows * kScoreDim, 52);
  const std::vector<T> v = random_values<T>(rows * kValueDim, 53);
  const std::vector<T> gate = random_values<T>(rows * kValueDim, 54);
  std::vector<float> numbers = random_values<float>(rows, 55);
  std::vector<T> out(rows * kValueDim);
  std::vector<float> den(rows), dots(rows);
  std::vector<float> first = random_values<float>(sequences * kHeads * kScoreDim * kValueDim, 56);
  std::vector<float> first_sum = random_values<float>(sequences * kHeads * kScoreDim, 57);
  for (float& x : first_sum) x = x * x;
  std::vector<float> last(first.size()), last_sum(first_sum.size());

  ScanParams p{};
  p.dtype = dtype<T>(), p.batch = batch, p.seqlen = kSeqlen, p.heads = kHeads;
  p.score_dim = kScoreDim, p.value_dim = kValueDim;
  p.q = view(c, q, kScoreDim), p.k = view(c, k, kScoreDim), p.v = view(c, v, kValueDim);
  p.out = view(c, out, kValueDim);
  p.q_scale = p.q_extra = p.k_scale = p.k_extra = {nullptr, 1};
  if (c.numbers) {
    p.gate = view(c, gate, kValueDim);
    p.q_scale = p.q_extra = {numbers.data(), kHeads};
    p.extra = true;
  }
  p.phi_scores = c.phi_scores, p.causal = c.causal, p.reverse = c.reverse;
  p.out_is_float = sizeof(T) == 4;
  if (c.normalize) p.den = den.data();
  if (c.causal) p.decay = kDecay;
  if (c.packed) p.cu_seqlens = kBoundaries, p.num_sequences = sequences;
  if (c.state) {
    p.first_state = first.data(), p.first_sum = first_sum.data();
    p.last_state = last.data(), p.last_sum = last_sum.data();
  }
  PermuteParams permute{};
  const RandomCycles random(kHeads, kScoreDim);
  const PermuteCycles cycles = random.view();
  permute.batch = batch, permute.seqlen = kSeqlen, permute.offset = 3;
  permute.cu_seqlens = p.cu_seqlens, permute.num_sequences = p.num_sequences;
  permute.head_dim = kScoreDim, permute.rows = kHeads;
  if (c.permuted) p.permute = &permute, p.cycles = &cycles;

  linear_attention::ScanRun(p, kKernels)();
  kKernels.dots(p, 0, batch * kSeqlen, dots.data());
  write(name + "/out", out);
  write(name + "/dots", dots);
  if (c.normalize) write(name + "/den", den);
  if (c.state) write(name + "/state", last), write(name + "/sum", last_sum);
}

}  // namespace

void run_linear_attention() {
  for (const Case& c : kCases) {
    each_type([&](auto zero, const char* type) {
      run<decltype(zero)>(c, std::string("linear_attention/") + c.name + "/" + type);
    });
  }
}

}  // namespace extrope
