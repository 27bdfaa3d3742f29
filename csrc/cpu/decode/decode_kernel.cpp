// Attention over a key/value cache on the CPU. Compiled once per instruction set, with
// EXTROPE_ISA as its name.

#include "cpu/decode/kernels.h"
#include "cpu/decode/merge.h"
#include "cpu/decode/types.h"
#include "cpu/decode/worker.h"

namespace extrope {

void EXTROPE_EXPAND(decode_splits_, EXTROPE_ISA)(const DecodeParams& p, const Split* splits,
                                                 int64_t count) {
  with_types(p.cache, [&](auto type, auto cached) {
    Worker<decltype(type), decltype(cached)> worker(p);
    for (int64_t n = 0; n < count; ++n) worker.run(splits[n]);
  });
}

void EXTROPE_EXPAND(merge_splits_, EXTROPE_ISA)(const DecodeParams& p, const QueryBlock* queries,
                                                int64_t count) {
  with_type(p.cache.dtype, [&](auto type) { merge_splits<decltype(type)>(p, queries, count); });
}

}  // namespace extrope
