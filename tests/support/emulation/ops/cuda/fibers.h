// The threads of a CUDA block as fibers of one thread, each of which runs until it has to wait at a
// barrier. The address sanitizer is told of their stacks, the thread sanitizer of every fiber as if
// it were a thread, and of what a barrier orders.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
// What fibers do here is no part of the kernels, and each runs alone.
#define EXTROPE_UNSEEN __attribute__((no_sanitize("thread"), noinline))
#else
#define EXTROPE_UNSEEN
#endif

namespace extrope {

class Fibers {
 public:
  static constexpr int64_t kStack = 64 << 10;

  // Runs body(index) for each of `count` fibers, up to its end.
  EXTROPE_UNSEEN static void run(int64_t count, const std::function<void(int64_t)>& body) {
    Fibers fibers(count, body);
    current_ = &fibers;
#if defined(__SANITIZE_THREAD__)
    fibers.tsan_ = __tsan_get_current_fiber();
#endif
    fibers.start();
    released(&fibers);
    while (fibers.left_ > 0) {
      fibers.moved_ = false;
      for (fibers.at_ = 0; fibers.at_ < count; ++fibers.at_) {
        if (!fibers.all_[fibers.at_].done) fibers.enter(fibers.all_[fibers.at_]);
      }
      if (!fibers.moved_) {
        std::fprintf(stderr, "a barrier that some threads of the block do not reach\n");
        std::abort();
      }
    }
    acquired(&fibers);
    current_ = nullptr;
  }

  // What was written before the one is seen after the other.
  static void released([[maybe_unused]] void* here) {
#if defined(__SANITIZE_THREAD__)
    __tsan_release(here);
#endif
  }
  static void acquired([[maybe_unused]] void* here) {
#if defined(__SANITIZE_THREAD__)
    __tsan_acquire(here);
#endif
  }

  EXTROPE_UNSEEN static int64_t index() { return current_->at_; }

  // Which of `count` fibers wait here.
  struct Barrier {
    explicit Barrier(int64_t count) : count(count) {}

    EXTROPE_UNSEEN void wait() {
      released(this);
      const int64_t round = this->round;
      current_->moved_ = true;
      if (++here == count) {
        here = 0, ++this->round;
      } else {
        while (this->round == round) current_->leave(current_->all_[current_->at_]);
      }
      current_->moved_ = true;
      acquired(this);
    }

    int64_t count, here = 0, round = 0;
  };

 private:
  struct Fiber {
    ucontext_t context;
    char* stack;
    bool done = false;
    void* fake = nullptr;
    void* tsan = nullptr;
  };

  Fibers(int64_t count, const std::function<void(int64_t)>& body)
      : body_(body), all_(count), left_(count) {}

  EXTROPE_UNSEEN void start() {
    // Kept: to allocate them takes longer than most kernels.
    static std::vector<std::unique_ptr<char[]>> stacks;
    while (stacks.size() < all_.size()) stacks.emplace_back(new char[kStack]);
    for (Fiber& fiber : all_) {
      fiber.stack = stacks[&fiber - all_.data()].get();
#if defined(__SANITIZE_ADDRESS__)
      __asan_unpoison_memory_region(fiber.stack, kStack);  // frames of a fiber that has ended
#endif
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack;
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, &Fibers::main, 0);
#if defined(__SANITIZE_THREAD__)
      fiber.tsan = __tsan_create_fiber(0);
#endif
    }
  }

  EXTROPE_UNSEEN static void main() {
    Fibers& fibers = *current_;
    Fiber& fiber = fibers.all_[fibers.at_];
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &fibers.stack_, &fibers.size_);
#endif
    acquired(&fibers);
    fibers.body_(fibers.at_);
    released(&fibers);
    fiber.done = true, fibers.moved_ = true, --fibers.left_;
    fibers.leave(fiber);
  }

  EXTROPE_UNSEEN void enter(Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
    void* fake;
    __sanitizer_start_switch_fiber(&fake, fiber.stack, kStack);
#endif
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(fiber.tsan, __tsan_switch_to_fiber_no_sync);
#endif
    swapcontext(&scheduler_, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  }

  EXTROPE_UNSEEN void leave(Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(fiber.done ? nullptr : &fiber.fake, stack_, size_);
#endif
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(tsan_, __tsan_switch_to_fiber_no_sync);
#endif
    swapcontext(&fiber.context, &scheduler_);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fiber.fake, &stack_, &size_);
#endif
  }

#if defined(__SANITIZE_THREAD__)
 public:
  ~Fibers() {
    for (Fiber& fiber : all_) __tsan_destroy_fiber(fiber.tsan);
  }

 private:
#endif

  static inline Fibers* current_ = nullptr;

  const std::function<void(int64_t)>& body_;
  std::vector<Fiber> all_;
  int64_t at_ = 0, left_;
  bool moved_ = false;  // since all were last asked
  ucontext_t scheduler_;
  const void* stack_ = nullptr;
  size_t size_ = 0;
  void* tsan_ = nullptr;
};

}  // namespace extrope
