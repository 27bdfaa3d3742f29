// What the launchers of the rotation check of values that the host can read.
#pragma once

#include "common/rope_args.h"

namespace extrope {

inline void check_axes_of_pairs(const RopeParams& p) {
  for (int64_t i = 0; p.axes && i < p.rotary_dim / 2; ++i) {
    require(0 <= p.axes[i] && p.axes[i] < p.num_axes, "axes must be from 0 to ", p.num_axes - 1,
            " for positions of ", p.num_axes, " axes, got ", p.axes[i]);
  }
}

inline void check_values(const RopeParams& p) {
  if (p.cu_seqlens) check_boundaries("rope", p);
  check_axes_of_pairs(p);
}

}  // namespace extrope
