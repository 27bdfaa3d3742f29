// Runs the CPU kernels of one instruction set on fixed inputs and writes what they return into a
// file: run.py compares the files of two machines.
#include "driver.h"

#include <cstdio>

#include "cpu/runtime/capability.h"

namespace {
std::FILE* results;
}

namespace extrope {

void write_bytes(const std::string& name, const char* type, const void* data, int64_t count,
                 int64_t size) {
  std::fprintf(results, "%s %s %lld\n", name.c_str(), type, static_cast<long long>(count));
  std::fwrite(data, size, count, results);
}

}  // namespace extrope

int main(int, char** arguments) {
  results = std::fopen(arguments[1], "wb");
  if (!results) return 1;
  extrope::run_conversions();
  extrope::run_rope();
  extrope::run_permute();
  extrope::run_attention();
  extrope::run_decode();
  extrope::run_linear_attention();
  std::printf("%d\n", static_cast<int>(extrope::capability()));
  return std::fclose(results);
}
