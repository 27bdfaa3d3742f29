// The cycles of one permutation, found by a block in shared memory.
//
// A cycle starts at its least dim. Every dim looks for it ahead, twice as far each round, so that
// 7 rounds find the cycles of 128 dims. pi^p(c) = flat[start + (index + p) mod length].
#pragma once

#include <cstdint>

#include "common/permute_params.h"

namespace extrope {

// Where dim c is in its cycle.
struct Place {
  uint32_t reciprocal;  // floor((2^32 - 1) / length)
  uint16_t start, length, index;
};

// Shared memory, in bytes: what stays, and what is free again when the cycles are found.
__device__ __host__ inline int64_t cycles_bytes(int64_t dim) {
  return dim * (sizeof(Place) + sizeof(uint16_t)) + sizeof(int);
}
__device__ __host__ inline int64_t search_bytes(int64_t dim) {
  return 2 * dim * (sizeof(uint32_t) + sizeof(uint16_t));
}

__device__ inline uint32_t high_product(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32);
}

__device__ inline uint32_t remainder(uint32_t x, const Place& cycle) {
  // The quotient is the true one or one less.
  const uint32_t rest = x - high_product(x, cycle.reciprocal) * cycle.length;
  return rest >= cycle.length ? rest - cycle.length : rest;
}

class Cycles {
 public:
  // `memory` holds cycles_bytes(dim) from a multiple of 16 bytes on.
  __device__ Cycles(unsigned char* memory, int dim)
      : place_(reinterpret_cast<Place*>(memory)),
        filled_(reinterpret_cast<int*>(place_ + dim)),
        flat_(reinterpret_cast<uint16_t*>(filled_ + 1)),
        dim_(dim) {}

  // By all threads of a block. Any contents of `permutation` give dims that exist: on the device
  // nobody checks them.
  __device__ void find(const int64_t* permutation, unsigned char* search, int thread, int threads) {
    // seen: the least dim so far and the steps to it, in one number. Of both arrays there are two,
    // one to read and one to write.
    uint32_t* const seen = reinterpret_cast<uint32_t*>(search);
    uint16_t* const ahead = reinterpret_cast<uint16_t*>(seen + 2 * dim_);
    for (int c = thread; c < dim_; c += threads) {
      seen[c] = static_cast<uint32_t>(c) << 16;
      ahead[c] = step(permutation, c);
      flat_[c] = static_cast<uint16_t>(c);
    }
    if (thread == 0) *filled_ = 0;
    __syncthreads();
    int now = 0, then = dim_;
    for (int steps = 1; steps < dim_; steps *= 2) {
      for (int c = thread; c < dim_; c += threads) {
        const int next = ahead[now + c];
        const uint32_t further = seen[now + next] + steps;
        seen[then + c] = seen[now + c] < further ? seen[now + c] : further;
        ahead[then + c] = ahead[now + next];
      }
      now = then;
      then = dim_ - now;
      __syncthreads();
    }
    place(permutation, seen + now, thread, threads);
  }

  // The dim `magnitude` steps ahead of dim c, or behind it.
  __device__ int source(int c, uint64_t magnitude, bool behind) const {
    const Place at = place_[c];
    uint32_t steps = remainder(static_cast<uint32_t>(magnitude), at);
    if (const uint32_t high = static_cast<uint32_t>(magnitude >> 32); high != 0) {
      const uint32_t wrap =
          remainder(0xffffffffu, at) + 1;  // 2^32 modulo the length, or the length
      steps = remainder(remainder(high, at) * wrap + steps, at);
    }
    uint32_t index = behind ? at.index + at.length - steps : at.index + steps;
    if (index >= at.length) index -= at.length;
    return flat_[existing(at.start + index)];
  }

 private:
  __device__ uint16_t step(const int64_t* permutation, int c) const {
    const int64_t next = permutation[c];
    return static_cast<uint16_t>(next < 0 ? 0 : next >= dim_ ? dim_ - 1 : next);
  }
  __device__ uint32_t existing(uint32_t place) const {
    const uint32_t last = static_cast<uint32_t>(dim_) - 1;
    return place < last ? place : last;
  }

  __device__ void place(const int64_t* permutation, const uint32_t* seen, int thread, int threads) {
    for (int c = thread; c < dim_; c += threads) {
      Place first{0xffffffffu, 0, 1, 0};
      if (static_cast<int>(seen[c] >> 16) == c) {
        const uint32_t length = 1 + (seen[step(permutation, c)] & 0xffff);
        // In which order the cycles lie does not matter.
        const int start = atomicAdd(filled_, static_cast<int>(length));
        first = {0xffffffffu / length, static_cast<uint16_t>(start), static_cast<uint16_t>(length),
                 0};
      }
      place_[c] = first;
    }
    __syncthreads();
    for (int c = thread; c < dim_; c += threads) {
      const uint32_t steps = seen[c] & 0xffff, least = seen[c] >> 16;
      Place own = place_[least];
      if (steps != 0) {
        own.index = static_cast<uint16_t>(own.length - steps);
        place_[c] = own;
      }
      flat_[existing(own.start + own.index)] = static_cast<uint16_t>(c);
    }
    __syncthreads();
  }

  Place* place_;
  int* filled_;
  uint16_t* flat_;
  int dim_;
};

}  // namespace extrope
