// What csrc/cuda/stream.h is on a device: there is no stream here, and nothing to guard.
#pragma once

namespace extrope {

struct OnDevice {
  void* stream = nullptr;
  OnDevice(const char* /*op*/, int /*device_index*/) {}
};

}  // namespace extrope
