// The entry point of the CPU library, and the op that describes it.

#include <exception>
#include <string>

#include "common/ops.h"
#include "cpu/runtime/capability.h"

namespace extrope {
namespace {

int64_t cpu_capability() { return capability(); }

const Ops ops{
    {"cpu_capability", TORCH_BOX(&cpu_capability), "", "CompositeExplicitAutograd"},
};

}  // namespace
}  // namespace extrope

extern "C" __attribute__((visibility("default"))) const char* extrope_signatures() {
  return extrope::signatures();
}

// Registers the ops, or returns why not in one line.
extern "C" __attribute__((visibility("default"))) const char* extrope_register(int /*has_gpu*/) {
  static std::string why;
  try {
    extrope::register_ops("CPU");
    return nullptr;
  } catch (const std::exception& error) {
    why = error.what();
    return why.c_str();
  }
}
