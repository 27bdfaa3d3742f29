// Cuts a scan into parts and distributes them over torch's threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/linear_attention/kernel.h"
#include "cpu/runtime/threads.h"

namespace extrope::linear_attention {

constexpr int64_t kTasksPerThread = 4;  // so that no thread waits long for the last one
// The cuts of a sequence decide the rounding of sums, so they do not depend on the number of
// threads: at least kParts parts in all, or without causality parts of kPartTokens.
constexpr int64_t kParts = 8, kPartTokens = 1536;

// Returns the tokens per part of a sequence, a multiple of the chunk.
inline int64_t part_tokens(const ScanParams& p, int64_t sequences, int64_t chunk) {
  if (!p.causal) return kPartTokens;
  // All parts except the last are read twice, first only for their state: worth it if threads would
  // idle.
  const int64_t states = sequences * p.heads;
  if (states >= kParts) return INT64_MAX;
  const int64_t parts = (kParts + states - 1) / states;
  const int64_t chunks = (p.seqlen / sequences + chunk - 1) / chunk;
  return std::max<int64_t>((chunks + parts - 1) / parts, 1) * chunk;
}

// Returns the parts of every sequence and state, in order. An empty sequence has one part, which
// passes its state on.
inline std::vector<ScanPart> cut(const ScanParams& p, int64_t chunk) {
  std::vector<ScanPart> parts;
  const int64_t sequences = p.cu_seqlens ? p.num_sequences : p.batch;
  const int64_t tokens = part_tokens(p, std::max<int64_t>(sequences, 1), chunk);
  for (int64_t s = 0; s < sequences; ++s) {
    ScanPart part{};
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

class ScanRun {
 public:
  ScanRun(const ScanParams& p, const ScanKernels& kernel)
      : p_(p), kernel_(kernel), plan_(kernel_.plan(p)), parts_(cut(p, plan_.chunk)) {
    const int64_t work = p.batch * p.seqlen * std::max(p.q.heads, p.heads) * p.score_dim *
                         (p.value_dim + plan_.chunk);
    threads_ = num_threads(static_cast<int64_t>(parts_.size()), work);
  }

  void operator()() {
    const bool whole = p_.causal && std::all_of(parts_.begin(), parts_.end(), is_whole);
    whole ? run_whole() : run_cut();
  }

 private:
  void run_whole() {
    const int64_t group = group_size();
    const DynamicThreads threads(threads_, plan_.workspace + group * plan_.state);
    threads.run(static_cast<int64_t>(parts_.size()) / group, [&](int64_t task, float* workspace) {
      float* own = workspace + plan_.workspace;
      const int64_t begin = task * group;
      for (int64_t i = 0; i < group; ++i) start(begin + i, own + i * plan_.state);
      visit(begin, group, true, workspace, own);
      for (int64_t i = 0; i < group; ++i) save(begin + i, own + i * plan_.state);
    });
  }

  void run_cut() {
    const int64_t count = static_cast<int64_t>(parts_.size());
    const AlignedFloats states = aligned_floats(count * plan_.state);
    const DynamicThreads threads(threads_, plan_.workspace);
    threads.run(count, [&](int64_t i, float* workspace) {
      float* own = states.get() + i * plan_.state;
      std::memset(own, 0, plan_.state * sizeof(float));
      // The last part of a causal sequence has no successor.
      if (!p_.causal || !is_last(i)) visit(i, 1, false, workspace, own);
    });
    pass_states(states.get());
    threads.run(count, [&](int64_t i, float* workspace) {
      float* own = states.get() + i * plan_.state;
      visit(i, 1, true, workspace, own);
      if (is_last(i)) save(i, own);
    });
  }

  static bool is_whole(const ScanPart& part) { return part.count == part.length; }
  bool is_last(int64_t i) const { return parts_[i].first + parts_[i].count == parts_[i].length; }

  void start(int64_t i, float* state) const {
    std::memset(state, 0, plan_.state * sizeof(float));
    if (p_.first_state) kernel_.convert(p_, parts_[i], true, state);
  }
  void save(int64_t i, float* state) const {
    if (p_.last_state) kernel_.convert(p_, parts_[i], false, state);
  }

  // Returns how many heads of a sequence go through its chunks together, as they share memory
  // pages.
  int64_t group_size() const {
    const int64_t count = static_cast<int64_t>(parts_.size());
    const auto balanced = [&](int64_t tasks) {
      return tasks % threads_ == 0 || tasks >= kTasksPerThread * threads_;
    };
    int64_t group = p_.seqlen > plan_.chunk ? p_.heads : 1;
    while (group > 1 && (p_.heads % group != 0 || !balanced(count / group))) --group;
    return group;
  }

  // Runs the chunks of `count` parts of equal length together.
  void visit(int64_t begin, int64_t count, bool writes_out, float* workspace, float* states) {
    for (int64_t first = 0; first < parts_[begin].count; first += plan_.chunk) {
      for (int64_t i = 0; i < count; ++i) {
        ScanPart chunk = parts_[begin + i];
        chunk.count = std::min(plan_.chunk, chunk.count - first);
        chunk.first += first;
        kernel_.chunk(p_, chunk, writes_out, workspace, states + i * plan_.state);
      }
    }
  }

  // Replaces each part's own sum by its first state: the sum of the sequence's earlier parts, or of
  // all parts without causality.
  void pass_states(float* states) {
    const AlignedFloats running = aligned_floats(plan_.state);
    const int64_t count = static_cast<int64_t>(parts_.size());
    for (int64_t begin = 0, end; begin < count; begin = end) {
      start(begin, running.get());
      end = begin;
      do {
        const double decay = p_.decay ? p_.decay[parts_[end].head] : 1.0;
        const float factor = static_cast<float>(std::pow(decay, parts_[end].count));
        float* own = states + end * plan_.state;
        for (int64_t j = 0; j < plan_.state; ++j) {
          const float before = running[j];
          running[j] = factor * before + own[j];
          own[j] = before;
        }
      } while (!is_last(end++));
      for (int64_t i = begin; !p_.causal && i < end; ++i) {
        std::copy_n(running.get(), plan_.state, states + i * plan_.state);
      }
    }
  }

  const ScanParams& p_;
  ScanKernels kernel_;
  ScanPlan plan_;
  std::vector<ScanPart> parts_;
  int64_t threads_;
};

}  // namespace extrope::linear_attention
