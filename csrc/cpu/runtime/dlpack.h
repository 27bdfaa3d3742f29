// What is used of DLPack's binary interface (https://dmlc.github.io/dlpack), as of its major
// version
// 1. The header that torch brings may not be included beside its stable ABI.
#pragma once

#include <cstdint>

namespace extrope::dlpack {

constexpr uint32_t kMajorVersion = 1;
constexpr int32_t kCPU = 1;                                         // device types
constexpr uint8_t kInt = 0, kFloat = 2, kBfloat = 4, kE4m3fn = 10;  // codes of dtypes

struct Tensor {
  void* data;
  int32_t device_type, device_id;
  int32_t dim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *sizes, *strides;  // in elements
  uint64_t byte_offset;
};

// What a framework offers for the tensors of its Python type.
struct ExchangeAPI {
  uint32_t major_version, minor_version;
  ExchangeAPI* older;
  void *allocate, *own, *to_python;
  int (*read)(void* object, Tensor* out);  // borrowed; not 0 with an error of Python's; may be null
  void* current_stream;
};

}  // namespace extrope::dlpack
