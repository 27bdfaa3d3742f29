// The numbers of an attention call, in the order of AttentionCall.numbers in
// extrope_kernels/ops/attention/call.py.
#pragma once

#include <optional>
#include <vector>

#include "common/regions.h"
#include "common/tensor_args.h"

namespace extrope {

struct AttentionNumbers {
  double softmax_scale;  // 0: head_dim ** -0.5
  double log_n;          // 0: none
  double attention_factor;
  bool interleaved;
  double softcap;  // 0: none
  bool float32_results;
  Regions regions;
};

inline AttentionNumbers attention_numbers(const char* op, const std::vector<double>& numbers) {
  constexpr int64_t kSingle = 8;  // before the regions
  constexpr int64_t kRegion = 1 + 2 * kMapNumbers;
  const int64_t size = static_cast<int64_t>(numbers.size());
  const int64_t count = (size - kSingle - kMapNumbers) / kRegion;
  require_of(op,
             1 <= count && count <= kMaxRegions && size == kSingle + count * kRegion + kMapNumbers,
             "numbers must describe 1 to ", kMaxRegions, " regions, got ", size, " of them");
  const double* next = numbers.data();
  AttentionNumbers n{};
  n.softmax_scale = *next++;
  n.log_n = *next++;
  n.attention_factor = *next++;
  n.interleaved = *next++ != 0;
  n.softcap = *next++;
  const double window = *next++;
  n.float32_results = *next++ != 0;
  Regions& r = n.regions;
  r.count = count;
  r.granularity = static_cast<int64_t>(*next++);
  r.sliding_window = window == 0 ? kNoWindow : static_cast<int64_t>(window);
  const double* q_maps = next + count;
  for (int64_t i = 0; i < count; ++i) {
    r.at[i] = {static_cast<int64_t>(next[i]), map_of(q_maps + i * kMapNumbers),
               map_of(q_maps + (count + i) * kMapNumbers)};
    require_of(op, i == 0 || r.at[i].start >= r.at[i - 1].start,
               "a score must have regions with rising starts, got ", r.at[i].start, " after ",
               r.at[i == 0 ? 0 : i - 1].start);
  }
  r.stored = map_of(q_maps + 2 * count * kMapNumbers);
  require_of(op, r.granularity >= 1, "a score's granularity must be >= 1, got ", r.granularity);
  require_of(op, r.sliding_window >= 1, "sliding_window must be None or >= 1, got ",
             r.sliding_window);
  return n;
}

}  // namespace extrope
