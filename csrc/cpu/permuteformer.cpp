// Registers the CPU kernels of decayed linear attention and splits their work over torch's threads.

#include "permuteformer.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <new>
#include <tuple>
#include <vector>

#include "capability.h"
#include "huge_pages.h"
#include "permuteformer_args.h"

namespace extrope {
namespace sweep {
namespace {

// Multiplications and additions of a token and head, below which waking threads costs too much.
constexpr int64_t kSmallWork = 1 << 20;
constexpr int64_t kDotGrain = 256;      // tokens
constexpr int64_t kPartsPerThread = 4;  // so that none waits long for the last one
// Without causality the parts of a sequence are of this length whatever the number of threads, and
// so are the sums.
constexpr int64_t kGatherTokens = 1536;

#define EXTROPE_KERNELS(isa)                                                                    \
  SweepKernels {                                                                                \
    sweep_plan_##isa, sweep_gather_##isa, sweep_part_##isa, sweep_load_##isa, sweep_save_##isa, \
        sweep_dots_##isa                                                                        \
  }

SweepKernels kernels() {
#if defined(__x86_64__)
  switch (capability()) {
    case kAvx512:
      return EXTROPE_KERNELS(avx512);
    case kAvx2:
      return EXTROPE_KERNELS(avx2);
    default:
      break;
  }
#endif
  return EXTROPE_KERNELS(baseline);
}

struct Aligned {
  void operator()(float* x) const { ::operator delete[](x, std::align_val_t{64}); }
};
using Floats = std::unique_ptr<float[], Aligned>;

Floats allocate(int64_t count) {
  return Floats(new (std::align_val_t{64}) float[static_cast<size_t>(count)]);
}

// How many tokens a part of a sequence has, a multiple of the chunk.
int64_t part_tokens(const SweepParams& p, int64_t sequences, int64_t chunk) {
  if (!p.causal) return kGatherTokens;
  const int64_t threads = torch::stable::get_num_threads(), tasks = sequences * p.heads;
  // A part but the last is read twice, first for its state alone: only where threads would idle.
  if (tasks % threads == 0 || tasks >= kPartsPerThread * threads) return INT64_MAX;
  const int64_t parts = (kPartsPerThread * threads + tasks - 1) / tasks;
  const int64_t chunks = (p.seqlen / sequences + chunk - 1) / chunk;
  return std::max<int64_t>((chunks + parts - 1) / parts, 1) * chunk;
}

// The parts of every sequence and state, those of one behind one another. An empty sequence has one
// part, which hands its state on.
std::vector<SweepPart> cut(const SweepParams& p, int64_t chunk) {
  std::vector<SweepPart> parts;
  const int64_t sequences = p.cu_seqlens ? p.num_sequences : p.batch;
  const int64_t tokens = part_tokens(p, std::max<int64_t>(sequences, 1), chunk);
  for (int64_t s = 0; s < sequences; ++s) {
    SweepPart part{};
    part.sequence = s;
    part.batch = p.cu_seqlens ? 0 : s;
    part.token = p.cu_seqlens ? p.cu_seqlens[s] : 0;
    part.length = p.cu_seqlens ? p.cu_seqlens[s + 1] - part.token : p.seqlen;
    for (part.head = 0; part.head < p.heads; ++part.head) {
      part.first = 0;
      do {
        part.count = std::min(tokens, part.length - part.first);
        parts.push_back(part);
        part.first += part.count;
      } while (part.first < part.length);
    }
  }
  return parts;
}

class Run {
 public:
  explicit Run(const SweepParams& p)
      : p_(p), kernel_(kernels()), plan_(kernel_.plan(p)), parts_(cut(p, plan_.chunk)) {
    const int64_t work = p.batch * p.seqlen * std::max(p.x.heads, p.heads) * p.score_dim *
                         (p.value_dim + plan_.chunk);
    threads_ = work < kSmallWork ? 1 : torch::stable::get_num_threads();
    threads_ = std::max<int64_t>(std::min<int64_t>(threads_, parts_.size()), 1);
    workspace_ = allocate(threads_ * plan_.workspace);
  }

  void operator()() {
    const int64_t count = static_cast<int64_t>(parts_.size());
    states_ = allocate(count * plan_.state);
    // Gathering the last part of a causal sequence would be for nothing: nothing follows it.
    each(count, [&](int64_t i, float* workspace) {
      std::fill_n(state(i), plan_.state, 0.0f);
      if (p_.causal && is_last(i)) return;
      kernel_.gather(p_, parts_[i], workspace, state(i));
    });
    p_.causal ? chain() : join();
    const int64_t group = grouped();
    each(count / group,
         [&](int64_t i, float* workspace) { sweep(i * group, (i + 1) * group, workspace); });
  }

 private:
  bool is_first(int64_t i) const { return parts_[i].first == 0; }
  bool is_last(int64_t i) const { return parts_[i].first + parts_[i].count == parts_[i].length; }
  float* state(int64_t i) const { return states_.get() + i * plan_.state; }

  // How many neighbours, heads of one sequence, walk through their tokens side by side. They share
  // pages of memory, and a row of the next one is fetched with that of one.
  int64_t grouped() const {
    const int64_t count = static_cast<int64_t>(parts_.size());
    const bool whole = std::all_of(parts_.begin(), parts_.end(),
                                   [](const SweepPart& part) { return part.count == part.length; });
    int64_t group = whole ? p_.heads : 1;
    const auto balanced = [&](int64_t tasks) {
      return tasks % threads_ == 0 || tasks >= kPartsPerThread * threads_;
    };
    while (group > 1 && (p_.heads % group != 0 || !balanced(count / group))) --group;
    return group;
  }

  void sweep(int64_t begin, int64_t end, float* workspace) {
    const SweepPart& whole = parts_[begin];
    const int64_t step = end - begin == 1 ? std::max<int64_t>(whole.count, 1) : plan_.chunk;
    for (int64_t first = 0; first < whole.count; first += step) {
      for (int64_t i = begin; i < end; ++i) {
        SweepPart part = parts_[i];
        part.first += first;
        part.count = std::min(step, whole.count - first);
        kernel_.sweep(p_, part, workspace, state(i));
      }
    }
    for (int64_t i = begin; i < end; ++i) {
      if (p_.last_state && is_last(i)) kernel_.save(p_, parts_[i], state(i));
    }
  }

  // Each part's own sum becomes the state that it starts from: of all parts before it.
  void chain() {
    const Floats running = allocate(2 * plan_.state);
    float *before = running.get(), *after = before + plan_.state;
    for (int64_t i = 0; i < static_cast<int64_t>(parts_.size()); ++i) {
      if (is_first(i)) {
        std::fill_n(before, plan_.state, 0.0f);
        if (p_.first_state) kernel_.load(p_, parts_[i], before);
      }
      const float decay = p_.decay ? p_.decay[parts_[i].head] : 1.0f;
      const float factor = static_cast<float>(std::pow(double{decay}, parts_[i].count));
      if (!is_last(i)) {
        for (int64_t j = 0; j < plan_.state; ++j) after[j] = factor * before[j] + state(i)[j];
      }
      std::copy_n(before, plan_.state, state(i));
      std::swap(before, after);
    }
  }

  // Every part gets the sum of all of its sequence.
  void join() {
    for (int64_t begin = 0, end; begin < static_cast<int64_t>(parts_.size()); begin = end) {
      for (end = begin + 1; !is_last(end - 1); ++end) {
        for (int64_t j = 0; j < plan_.state; ++j) state(begin)[j] += state(end)[j];
      }
      for (int64_t i = begin + 1; i < end; ++i) {
        std::copy_n(state(begin), plan_.state, state(i));
      }
    }
  }

  // Runs work(index, workspace) for every index below `count`.
  template <typename Work>
  void each(int64_t count, const Work& work) {
    std::atomic<int64_t> next{0};
    const auto drain = [&](int64_t begin, int64_t end) {
      for (int64_t slot = begin; slot < end; ++slot) {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
          work(i, workspace_.get() + slot * plan_.workspace);
        }
      }
    };
    threads_ == 1 ? drain(0, 1) : torch::stable::parallel_for(0, threads_, 1, drain);
  }

  const SweepParams& p_;
  SweepKernels kernel_;
  SweepPlan plan_;
  std::vector<SweepPart> parts_;
  int64_t threads_;
  Floats workspace_, states_;
};

Tensor empty_rows(const SweepParams& p, const Tensor& like, int64_t heads, int64_t dim, bool wide) {
  std::vector<int64_t> sizes{p.batch, p.seqlen, heads, dim};
  if (p.cu_seqlens) sizes.erase(sizes.begin());
  const Tensor rows = wide ? torch::stable::new_empty(like, sizes, ScalarType::Float)
                           : torch::stable::new_empty(like, sizes);
  prefer_huge_pages(rows.data_ptr(), rows.numel() * (wide || p.dtype == DType::f32 ? 4 : 2));
  return rows;
}

Tensor empty_numbers(const SweepParams& p, const Tensor& like, int64_t heads) {
  std::vector<int64_t> sizes{p.batch, heads, p.seqlen};
  if (p.cu_seqlens) sizes.erase(sizes.begin());
  return torch::stable::new_empty(like, sizes, ScalarType::Float);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_sweep(
    Tensor x, Tensor y, Tensor w, OptionalTensor x_scale, OptionalTensor x_extra,
    OptionalTensor y_scale, OptionalTensor y_extra, OptionalTensor gate, OptionalTensor decay,
    OptionalTensor cu_seqlens, OptionalTensor first_state, OptionalTensor first_sum, int64_t heads,
    bool phi_scores, bool causal, bool reverse, bool normalize, bool out_is_float,
    bool keep_state) {
  SweepParams p = make_params(x, y, w, heads, cu_seqlens);
  p.phi_scores = phi_scores, p.causal = causal, p.reverse = reverse;
  p.out_is_float = out_is_float || p.dtype == DType::f32;
  p.extra = x_extra.has_value() || y_extra.has_value();
  p.x_scale = numbers(p, x_scale, p.x.heads, "x_scale");
  p.x_extra = numbers(p, x_extra, p.x.heads, "x_extra");
  p.y_scale = numbers(p, y_scale, p.y.heads, "y_scale");
  p.y_extra = numbers(p, y_extra, p.y.heads, "y_extra");
  if (decay.has_value()) p.decay = floats(*decay, {heads}, "decay");
  const int64_t sequences = p.cu_seqlens ? p.num_sequences : p.batch;
  if (first_state.has_value()) {
    p.first_state = floats(*first_state, {sequences, heads, p.score_dim, p.value_dim}, "state");
    p.first_sum = floats(*first_sum, {sequences, heads, p.score_dim}, "sum");
  }
  const Tensor out = empty_rows(p, x, std::max(p.x.heads, heads), p.value_dim, out_is_float);
  p.out = view(out, p.cu_seqlens, "out");
  if (gate.has_value()) p.gate = view(*gate, p.cu_seqlens, "gate");
  const Tensor den = normalize ? empty_numbers(p, x, p.x.heads)
                               : torch::stable::new_empty(x, {0}, ScalarType::Float);
  if (normalize) p.den = static_cast<float*>(den.data_ptr());
  Tensor state = torch::stable::new_empty(x, {0}, ScalarType::Float), sum = state;
  if (keep_state) {
    state = torch::stable::new_empty(x, {sequences, heads, p.score_dim, p.value_dim},
                                     ScalarType::Float);
    sum = torch::stable::new_empty(x, {sequences, heads, p.score_dim}, ScalarType::Float);
    p.last_state = static_cast<float*>(state.data_ptr());
    p.last_sum = static_cast<float*>(sum.data_ptr());
  }
  Run{p}();
  return {out, den, state, sum};
}

Tensor row_dots(Tensor x, Tensor y, bool packed) {
  SweepParams p{};
  p.dtype = dtype_of(x);
  p.x = view(x, packed, "x"), p.y = view(y, packed, "y");
  check_like(y, x, "y");
  set_sizes(p, x, packed);
  const Tensor out =
      packed ? torch::stable::new_empty(x, {p.x.heads, p.seqlen}, ScalarType::Float)
             : torch::stable::new_empty(x, {p.batch, p.x.heads, p.seqlen}, ScalarType::Float);
  float* data = static_cast<float*>(out.data_ptr());
  const SweepKernels kernel = kernels();
  torch::stable::parallel_for(0, p.batch * p.seqlen, kDotGrain, [&](int64_t begin, int64_t end) {
    kernel.dots(p, begin, end, data);
  });
  return out;
}

}  // namespace
}  // namespace sweep

STABLE_TORCH_LIBRARY_IMPL(extrope, CPU, m) {
  m.impl("linear_sweep", TORCH_BOX(&sweep::linear_sweep));
  m.impl("row_dots", TORCH_BOX(&sweep::row_dots));
}

}  // namespace extrope
