// Attention over regions, forward and backward.
#include "cpu/attention/cos_sin.h"
#include "cpu/attention/run.h"
#include "driver.h"
#include "regions.h"

namespace extrope {
namespace {

constexpr int64_t kPad = 16;  // frequencies, of whole vectors
constexpr double kAmplitude = 1.0625;
constexpr attention::AttentionKernels kKernels{
    EXTROPE_EXPAND(attention_plan_, EXTROPE_ISA),
    EXTROPE_EXPAND(attention_backward_plan_, EXTROPE_ISA),
    EXTROPE_EXPAND(attention_tile_, EXTROPE_ISA),
    EXTROPE_EXPAND(attention_backward_tile_, EXTROPE_ISA)};

struct Case {
  const char* name;
  Regions regions;
  int64_t seqlen_q, seqlen_k, head_dim, half;
  bool interleaved, decay, row_scale, packed;
  bool softmax_options = false;  // a cap, sinks, a sliding window, and starts
};

const Case kCases[] = {
    {"rope", rope(), 150, 150, 64, 32, false, false, false, false},
    {"xpos_gptj", rope(), 150, 150, 64, 20, true, true, false, false},
    {"rerope_scaled", rerope(40), 150, 150, 72, 36, false, false, true, false},
    {"self_extend", self_extend(32, 4), 90, 170, 128, 64, false, false, false, false},
    // Of 150 keys one, rotated in advance, rounds to another bfloat16 on ARM alone.
    {"by_pair", groups_by_pair(), 90, 170, 72, 32, false, false, false, false},
    {"chunked", chunked(32), 150, 150, 64, 32, false, false, false, false},
    {"packed", rerope(24), 150, 150, 64, 32, false, false, false, true},
    {"few_keys", rope(), 60, 35, 64, 32, false, false, false, false},
    {"softmax_options", rerope(40), 90, 150, 64, 32, false, false, true, false, true},
};
constexpr int32_t kBoundaries[] = {0, 17, 17, 103, 150};
constexpr int32_t kStarts[] = {30, 71};
constexpr float kSinks[] = {0.5f, -2.0f, 3.0f, 0.0f};

// All tensors of one call.
template <typename T>
class Call {
 public:
  explicit Call(const Case& c) : c_(c), batch_(c.packed ? 1 : 2) {
    p_.dtype = dtype<T>();
    p_.batch = batch_, p_.seqlen_q = p_.lse_head = c.seqlen_q, p_.seqlen_k = c.seqlen_k;
    p_.heads_q = 4, p_.heads_k = 2, p_.head_dim = c.head_dim;
    p_.regions = c.regions, p_.softmax_scale = 0.125f;
    p_.rotation = {c.head_dim, c.half, (c.head_dim - 2 * c.half) / 8 * 8, c.interleaved};
    if (c.packed) p_.cu_seqlens = kBoundaries, p_.num_sequences = std::size(kBoundaries) - 1;
    if (c.softmax_options) {
      p_.softcap = 1.5f, p_.sinks = {kSinks, 1}, p_.regions.sliding_window = 56;
      p_.q_start = {kStarts, 1, 0}, p_.k_start = {kStarts, 1, -20};
    }
    for (int64_t i = 0; i < c.seqlen_q; ++i) row_scale_.push_back(1.0f + 0x1p-8f * i);
    if (c.row_scale) p_.query_scale = {row_scale_.data(), 0, 1};
    if (!c.packed && !c.softmax_options) p_.q_start.offset = c.seqlen_k - c.seqlen_q;
    q_ = random_values<T>(elements(true), 31), k_ = random_values<T>(elements(false), 32);
    v_ = random_values<T>(elements(false), 33), dout_ = random_values<T>(elements(true), 34);
    dlse_ = random_values<float>(batch_ * p_.heads_q * c.seqlen_q, 35);
    p_.q = view(q_.data(), true), p_.v = view(v_.data(), false);
    for (AttentionTensor& x : p_.k) x = view(k_.data(), false);
    fill_tables();
  }

  void run(const std::string& name) {
    forward();
    backward();
    write(name + "/out", out_);
    write(name + "/lse", lse_);
    write(name + "/dq", dq_);
    write(name + "/dk", dk_);
    write(name + "/dv", dv_);
  }

 private:
  int64_t elements(bool queries) const {
    return batch_ * (queries ? c_.seqlen_q * p_.heads_q : c_.seqlen_k * p_.heads_k) * c_.head_dim;
  }
  AttentionTensor view(void* data, bool queries) const {
    const int64_t seq = (queries ? p_.heads_q : p_.heads_k) * c_.head_dim;
    return {data, c_.packed ? 0 : seq * (queries ? c_.seqlen_q : c_.seqlen_k), seq, c_.head_dim,
            c_.head_dim};
  }

  void fill_tables() {
    const int64_t padded = (c_.half + kPad - 1) / kPad * kPad;
    inv_freq_ = frequencies(c_.half, padded);
    for (int64_t i = 0; i < padded; ++i) q_decay_.push_back(-0.001 * (i % 5));
    for (double x : q_decay_) k_decay_.push_back(-x);
    for (int64_t r = 0; r < p_.regions.count; ++r) {
      const Region& region = p_.regions.at[r];
      p_.q_cos_sin[r] = fill(region.q_map, true, q_memory_[r], padded);
      if (region.k_map == p_.regions.stored) continue;
      p_.k_cos_sin[r] = fill(region.k_map, false, k_memory_[r], padded);
    }
  }

  CosSin fill(const PositionMap& map, bool queries, std::vector<float>& memory, int64_t padded) {
    CosSinTable t{};
    t.inv_freq = inv_freq_.data(), t.half = c_.half, t.padded = padded;
    if (c_.decay) t.log_decay = (queries ? q_decay_ : k_decay_).data();
    t.amplitude = queries ? kAmplitude : 1.0;
    t.map = map, t.pair_maps = p_.regions.pair_maps;
    t.heads = 1;
    t.from = queries ? p_.regions.q_stored : p_.regions.stored;
    t.start = queries ? p_.q_start : p_.k_start;
    t.cu_seqlens = p_.cu_seqlens, t.num_sequences = p_.num_sequences;
    t.tokens = !queries ? c_.seqlen_k : map.is_constant() ? 1 : c_.seqlen_q;
    const int64_t rows = c_.softmax_options ? batch_ : 1;
    memory.resize(rows * t.tokens * t.stride());
    t.out = memory.data();
    EXTROPE_EXPAND(fill_cos_sin_, EXTROPE_ISA)(t, 0, rows * t.tokens);
    return t.rows(rows);
  }

  // As rotated_keys.h: keys in 16 bits are rotated beforehand.
  void forward() {
    AttentionParams p = p_;
    std::vector<T> rotated[kMaxRegions];
    for (int64_t r = 0; r < p.regions.count && sizeof(T) == 2; ++r) {
      if (!p.k_cos_sin[r].cos) continue;
      rotated[r].resize(k_.size());
      p.k[r] = view(rotated[r].data(), false);
      EXTROPE_EXPAND(rotate_keys_, EXTROPE_ISA)
      (p, p_.k[r], p.k_cos_sin[r], p.k[r], 0, batch_ * c_.seqlen_k);
      p.k_cos_sin[r] = {};
    }
    out_.resize(q_.size()), lse_.resize(dlse_.size());
    p.out = view(out_.data(), true), p.lse = lse_.data();
    attention::run_forward(p, kKernels);
  }

  void backward() {
    AttentionParams p = p_;
    dq_.resize(q_.size()), dk_.resize(k_.size()), dv_.resize(v_.size());
    p.out = view(out_.data(), true), p.dout = view(dout_.data(), true);
    p.lse = lse_.data(), p.dlse = c_.row_scale ? dlse_.data() : nullptr;
    p.dq = view(dq_.data(), true), p.dk = view(dk_.data(), false), p.dv = view(dv_.data(), false);
    attention::run_backward(p, kKernels);
  }

  const Case& c_;
  const int64_t batch_;
  AttentionParams p_{};
  std::vector<T> q_, k_, v_, out_, dout_;
  std::vector<double> inv_freq_, q_decay_, k_decay_;
  std::vector<float> row_scale_, lse_, dlse_, dq_, dk_, dv_;
  std::vector<float> q_memory_[kMaxRegions], k_memory_[kMaxRegions];
};

}  // namespace

void run_attention() {
  for (const Case& c : kCases) {
    each_type([&](auto zero, const char* type) {
      Call<decltype(zero)>(c).run(std::string("attention/") + c.name + "/" + type);
    });
  }
}

}  // namespace extrope
