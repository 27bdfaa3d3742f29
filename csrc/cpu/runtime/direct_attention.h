// What ops of attention read of Python past PyTorch's dispatcher: see direct.h.
#pragma once

#include "common/attention_args.h"
#include "cpu/runtime/direct.h"

namespace extrope {

// In the schema's order, with both lists at the end.
inline AttentionNumbers attention_numbers(Items& numbers) {
  AttentionNumbers n{.starts = {},
                     .granularity = numbers.whole_number(),
                     .maps = {},
                     .softmax_scale = numbers.optional_number(),
                     .log_n = numbers.optional_number(),
                     .attention_factor = numbers.number(),
                     .interleaved = numbers.flag(),
                     .softcap = numbers.number(),
                     .sliding_window = numbers.optional_whole_number()};
  // Of each region a start and two maps, and the map that keys are stored by.
  n.starts.resize((numbers.left() - kMapNumbers) / (1 + 2 * kMapNumbers));
  for (int64_t& start : n.starts) start = numbers.whole_number();
  n.maps.resize(numbers.left());
  for (double& x : n.maps) x = numbers.number();
  return n;
}

}  // namespace extrope
