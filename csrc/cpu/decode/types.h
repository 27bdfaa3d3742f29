// The element types of caches.
#pragma once

#include "cpu/decode/params.h"
#include "cpu/simd/simd.h"

namespace extrope {
namespace {

// Calls run(x) with a value of the element type.
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

}  // namespace
}  // namespace extrope
