#include "cpu/runtime/output_pages.h"

#include <sys/mman.h>

#include <mutex>

namespace extrope {
namespace {

#if defined(__aarch64__)
constexpr uintptr_t kPage = uintptr_t{1} << 16;  // the largest that a kernel may be built for
#else
constexpr uintptr_t kPage = 4096;
#endif
constexpr uintptr_t kHugePage = uintptr_t{1} << 21;
constexpr int64_t kLarge = int64_t{4} << 20;  // bytes; malloc keeps what is smaller
constexpr int64_t kMostKept = int64_t{1} << 30;

struct Block {
  void* begin;
  int64_t bytes;
};

class KeptBlocks {
 public:
  // The smallest that holds `bytes` and is at most a quarter larger; begin is null if none is.
  Block take(int64_t bytes) {
    // A fork while another thread holds the lock leaves it locked in the child for ever.
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) return {nullptr, 0};
    auto best = blocks_.end();
    for (auto block = blocks_.begin(); block != blocks_.end(); ++block) {
      if (block->bytes < bytes || block->bytes - bytes > bytes / 4) continue;
      if (best == blocks_.end() || block->bytes < best->bytes) best = block;
    }
    if (best == blocks_.end()) return {nullptr, 0};
    const Block found = *best;
    blocks_.erase(best);
    kept_ -= found.bytes;
    return found;
  }

  void keep(Block block) {
    if (block.bytes > kMostKept || madvise(block.begin, block.bytes, MADV_FREE) != 0) {
      munmap(block.begin, block.bytes);
      return;
    }
    std::vector<Block> surplus{block};
    if (const std::unique_lock lock(mutex_, std::try_to_lock); lock) {
      surplus.clear();
      blocks_.push_back(block);
      kept_ += block.bytes;
      while (kept_ > kMostKept) surplus.push_back(oldest());
    }
    for (const Block& b : surplus) munmap(b.begin, b.bytes);
  }

  int64_t release() {
    std::vector<Block> all;
    {
      const std::lock_guard lock(mutex_);
      all.swap(blocks_);
      kept_ = 0;
    }
    int64_t released = 0;
    for (const Block& b : all) munmap(b.begin, b.bytes), released += b.bytes;
    return released;
  }

 private:
  Block oldest() {
    const Block block = blocks_.front();
    blocks_.erase(blocks_.begin());
    kept_ -= block.bytes;
    return block;
  }

  std::mutex mutex_;
  std::vector<Block> blocks_;  // in the order in which they were freed
  int64_t kept_ = 0;           // bytes
};

// Never destroyed: the last tensors of a process are freed after its static objects.
KeptBlocks& kept_blocks() {
  static KeptBlocks& blocks = *new KeptBlocks;
  return blocks;
}

// A mapping that begins at a huge page; its last, partial one is of small pages.
Block map(int64_t bytes) {
  const uintptr_t wanted = (bytes + kPage - 1) / kPage * kPage, all = wanted + kHugePage;
  void* memory = mmap(nullptr, all, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return {nullptr, 0};
  const uintptr_t first = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t begin = (first + kHugePage - 1) / kHugePage * kHugePage;
  if (begin > first) munmap(memory, begin - first);
  if (begin + wanted < first + all) {
    munmap(reinterpret_cast<void*>(begin + wanted), first + all - begin - wanted);
  }
  void* aligned = reinterpret_cast<void*>(begin);
  madvise(aligned, wanted, MADV_HUGEPAGE);  // a hint: what it says is not needed
  return {aligned, static_cast<int64_t>(wanted)};
}

void done_with(void* begin, void* bytes) {
  kept_blocks().keep({begin, static_cast<int64_t>(reinterpret_cast<uintptr_t>(bytes))});
}

int64_t element_size(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return 8;
    case ScalarType::Float:
      return 4;
    default:
      return 2;
  }
}

// The tensor, or none where it is small or there is no memory: torch says that better.
bool large(const int64_t* sizes, const int64_t* strides, int64_t dim, int64_t bytes, int32_t dtype,
           AtenTensorHandle* tensor) {
  if (bytes < kLarge) return false;
  Block block = kept_blocks().take(bytes);
  if (!block.begin) block = map(bytes);
  if (!block.begin) return false;
  TORCH_ERROR_CODE_CHECK(torch_from_blob(
      block.begin, dim, sizes, strides, 0, dtype, aoti_torch_device_type_cpu(), -1, tensor,
      aoti_torch_layout_strided(), nullptr, 0, done_with, reinterpret_cast<void*>(block.bytes)));
  return true;
}

}  // namespace

Tensor fresh_like(const Tensor& x) {
  const int64_t bytes = x.numel() * element_size(x.scalar_type());
  Layout like;
  if (bytes < kLarge || !layout_like(x, like)) return new_like(x);
  AtenTensorHandle tensor;
  const bool made = large(like.sizes, like.strides, x.dim(), bytes, dtype_code(x), &tensor);
  return made ? Tensor(tensor) : new_like(x);
}

Tensor fresh(const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t count = 1;
  for (size_t i = sizes.size(); i-- > 0;) strides[i] = count, count *= sizes[i];
  const int64_t dim = static_cast<int64_t>(sizes.size());
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle tensor;
  if (!large(sizes.data(), strides.data(), dim, count * element_size(dtype), code, &tensor)) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes.data(), strides.data(), code,
                                                    aoti_torch_device_type_cpu(), -1, &tensor));
  }
  return Tensor(tensor);
}

int64_t release_kept_pages() { return kept_blocks().release(); }

}  // namespace extrope
