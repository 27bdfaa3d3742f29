// The rotation and its gradients.
#include "cpu/rope/kernel.h"
#include "cpu/runtime/threads.h"
#include "driver.h"

namespace extrope {
namespace {

constexpr int64_t kBatch = 2, kSeqlen = 37, kHeadDim = 72, kHeads[] = {3, 2};

struct Case {
  const char* name;
  int64_t rotary_dim;
  bool interleaved, decay, backward, float_positions;
};

constexpr Case kCases[] = {
    {"neox", 72, false, false, false, false},    {"gptj", 72, true, false, false, false},
    {"partial", 36, false, false, false, true},  {"partial_gptj", 36, true, false, false, true},
    {"xpos", 72, false, true, false, false},     {"xpos_gptj", 44, true, true, false, false},
    {"backward", 72, false, false, true, false}, {"backward_gptj", 36, true, true, true, false},
};

// Far positions too, up to 2**24.
void set_positions(RopeParams& p, const Case& c, std::vector<int64_t>& whole,
                   std::vector<float>& fractions) {
  for (int64_t i = 0; i < kBatch * kSeqlen; ++i) {
    whole.push_back(c.decay ? i % kSeqlen : i % kSeqlen * (i % 3 == 0 ? 453'438 : 11));
    fractions.push_back(static_cast<float>(i) * 0.75f);
  }
  p.positions = c.float_positions ? static_cast<const void*>(fractions.data()) : whole.data();
  p.position_type = c.float_positions ? PositionType::f32 : PositionType::i64;
  p.position_batch = kSeqlen, p.position_seq = 1;
}

template <typename T>
void run(const Case& c, const std::string& type) {
  RopeParams p{};
  p.batch = kBatch, p.seqlen = kSeqlen;
  std::vector<int64_t> whole;
  std::vector<float> fractions;
  set_positions(p, c, whole, fractions);
  const int64_t half = c.rotary_dim / 2;
  const std::vector<double> inv_freq = frequencies(half, half);
  std::vector<float> log_decay(half);
  for (int64_t i = 0; i < half; ++i) log_decay[i] = -0.01f * static_cast<float>(i % 7);
  p.num_tensors = 2, p.dtype = dtype<T>(), p.interleaved = c.interleaved, p.conjugate = c.backward;
  p.head_dim = kHeadDim, p.rotary_dim = c.rotary_dim;
  p.inv_freq = inv_freq.data(), p.inv_freq_is_f64 = true;
  p.log_decay = c.decay ? log_decay.data() : nullptr;
  p.decay_origin = 5.0, p.amplitude = 1.0625;

  std::vector<T> in[2], saved[2], out[2];
  for (int64_t i = 0; i < 2; ++i) {
    const int64_t head = kHeadDim, seq = kHeads[i] * head, batch = kSeqlen * seq;
    in[i] = random_values<T>(kBatch * batch, 10 + i);
    saved[i] = random_values<T>(kBatch * batch, 20 + i);
    out[i].resize(in[i].size());
    RopeTensor& x = p.tensors[i];
    x.in = in[i].data(), x.out = out[i].data();
    x.saved = c.backward ? saved[i].data() : nullptr;
    x.in_batch = x.out_batch = x.saved_batch = batch;
    x.in_seq = x.out_seq = x.saved_seq = seq;
    x.in_head = x.out_head = x.saved_head = head;
    x.heads = kHeads[i], x.decay_sign = i == 0 ? 1.0 : -1.0;
  }
  using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
  std::vector<Wide> angle_grad(c.backward ? kBatch * kSeqlen * half : 0);
  if (c.backward) p.angle_grad = angle_grad.data(), p.angle_heads = 1;

  share_out(kBatch * kSeqlen, kBytesPerThread / 8, [&](int64_t begin, int64_t end) {
    EXTROPE_EXPAND(rope_tokens_, EXTROPE_ISA)(p, begin, end);
  });
  const std::string name = std::string("rope/") + c.name + "/" + type;
  write(name + "/q", out[0]);
  write(name + "/k", out[1]);
  if (c.backward) write(name + "/angle_grad", angle_grad);
}

}  // namespace

void run_rope() {
  for (const Case& c : kCases) {
    each_type([&](auto zero, const char* type) { run<decltype(zero)>(c, type); });
    run<double>(c, "float64");
  }
}

}  // namespace extrope
