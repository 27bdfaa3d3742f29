// Cuts a sweep into parts and shares them out over torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <new>
#include <vector>

#include "cpu/linear_attention/kernels.h"

namespace extrope::sweep {

// Multiplications and additions of a token and head, below which waking threads costs too much.
constexpr int64_t kSmallWork = 1 << 20;
constexpr int64_t kPartsPerThread = 4;  // so that none waits long for the last one
// Where a sequence is cut decides how sums round, so that the number of threads has no say in it:
// as many parts in all as this at least, or without causality parts of this length.
constexpr int64_t kTasks = 8, kGatherTokens = 1536;

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
  // A part but the last is read twice, first for its state alone: only where threads would idle.
  const int64_t tasks = sequences * p.heads;
  if (tasks >= kTasks) return INT64_MAX;
  const int64_t parts = (kTasks + tasks - 1) / tasks;
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
  Run(const SweepParams& p, const SweepKernels& kernel)
      : p_(p), kernel_(kernel), plan_(kernel_.plan(p)), parts_(cut(p, plan_.chunk)) {
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
      gather(i, workspace);
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

  // The chunk of a part that begins `first` tokens behind it, for a kernel.
  SweepPart chunk(int64_t i, int64_t first) const {
    SweepPart part = parts_[i];
    part.count = std::min(plan_.chunk, part.count - first);
    part.first += first;
    return part;
  }

  void gather(int64_t i, float* workspace) {
    for (int64_t first = 0; first < parts_[i].count; first += plan_.chunk) {
      kernel_.gather(p_, chunk(i, first), {chunk(i, first + plan_.chunk), 1, 0}, workspace,
                     state(i));
    }
  }

  void sweep(int64_t begin, int64_t end, float* workspace) {
    for (int64_t first = 0; first < parts_[begin].count; first += plan_.chunk) {
      SweepNext next{chunk(begin, first + plan_.chunk), end - begin, 0};
      for (int64_t i = begin; i < end; ++i, ++next.share) {
        kernel_.sweep(p_, chunk(i, first), next, workspace, state(i));
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

}  // namespace extrope::sweep
