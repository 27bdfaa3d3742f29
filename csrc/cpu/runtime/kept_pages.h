// Large scratch memory of kernels, kept after its use.
//
// Fresh pages cost more than the kernels that fill them, since the operating system clears and maps
// them. So large tables have their own mappings of huge pages, and an unused mapping serves the
// next request of about its size. The operating system may take kept pages back (MADV_FREE), and
// does so before memory runs short.
#pragma once

#include <cstdint>
#include <new>
#include <utility>

namespace extrope {

constexpr int64_t kLarge = int64_t{4} << 20;  // bytes; malloc keeps smaller blocks

struct Pages {
  void* begin;
  int64_t bytes;
};

// Returns at least `bytes` bytes; begin is null below kLarge, and if there is no memory.
Pages take_pages(int64_t bytes);
void keep_pages(Pages pages);

// Scratch memory of a call.
class Memory {
 public:
  explicit Memory(int64_t bytes)
      : pages_(take_pages(bytes)),
        data_(pages_.begin ? pages_.begin : ::operator new(bytes, kAlign)) {}
  Memory(Memory&& from) noexcept : pages_(from.pages_), data_(std::exchange(from.data_, nullptr)) {}
  Memory(const Memory&) = delete;
  ~Memory() {
    if (!data_) return;
    pages_.begin ? keep_pages(pages_) : ::operator delete(data_, kAlign);
  }
  void* data() const { return data_; }

 private:
  static constexpr std::align_val_t kAlign{64};
  Pages pages_;
  void* data_;
};

}  // namespace extrope
