// The element types of caches.
#pragma once

#include "cpu/decode/params.h"
#include "cpu/simd/e4m3.h"

namespace extrope {
namespace {

// Calls run(x) with a value of the element type of queries.
template <typename Run>
void with_type(DType dtype, Run run) {
  switch (dtype) {
    case DType::bf16:
      return run(bf16{});
    case DType::f16:
      return run(f16{});
    default:
      return run(float{});
  }
}

// Calls run(x, y) with values of the element types of queries and of the cache.
template <typename Run>
void with_types(const KVCache& cache, Run run) {
  with_type(cache.dtype, [&](auto type) {
    if (cache.is_e4m3()) return run(type, e4m3{});
    run(type, type);
  });
}

}  // namespace
}  // namespace extrope
