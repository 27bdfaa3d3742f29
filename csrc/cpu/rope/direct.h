// A rotation that Python asks for past PyTorch's dispatcher: see cpu/runtime/direct.h.
#pragma once

#include "common/rope_norm_args.h"
#include "cpu/runtime/direct.h"

namespace extrope {

// Its tensors are those of the op's schema, in that order; its numbers attention_factor, offset,
// interleaved, inverse, decay_origin and, with a norm, norm_eps. In place, the results are q and k.
class DirectRotation {
 public:
  DirectRotation(Items outs, Items numbers, Items given, bool with_norm)
      : q_(given.tensor()),
        k_(given.optional_tensor()),
        weights_{with_norm ? given.optional_tensor() : OptionalView(),
                 with_norm ? given.optional_tensor() : OptionalView()},
        numbers_(numbers),
        rope_(params(outs, given)) {}

  int64_t tokens() const { return rope_.batch * rope_.seqlen; }
  int64_t elements() const { return q_.numel(); }
  const RopeParams& rope() const { return rope_; }
  RopeNormParams norm() {
    return make_norm_params(rope_, q_, k_, weights_[0], weights_[1], numbers_.number());
  }

 private:
  RopeParams params(Items& outs, Items& given) {
    const TensorView inv_freq = given.tensor();
    const OptionalView positions = given.optional_tensor();
    const RopeOptions options{given.optional_tensor(), given.optional_tensor(),
                              given.optional_tensor(), numbers_.number(),
                              numbers_.whole_number(), numbers_.flag(),
                              numbers_.flag(),         numbers_.number()};
    RopeParams p = make_params(q_, k_, inv_freq, positions, options, /*adjoint=*/false);
    for (int n = 0; n < p.num_tensors; ++n) {
      const TensorView out = outs.tensor();
      require(!overlaps_itself(out), "a result must not be expanded");
      set_output(p.tensors[n], out, options.cu_seqlens.has_value());
    }
    return p;
  }

  const TensorView q_;
  const OptionalView k_, weights_[2];
  Items numbers_;
  const RopeParams rope_;
};

}  // namespace extrope
