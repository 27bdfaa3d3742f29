// The permutation. A block finds the cycles of one permutation and then goes through tokens: a
// thread owns one vector of VEC dims of a token, knows the dims that it takes, and fetches them
// for the heads of q and the head of k that share them. Vectors go through shared memory, where
// dims change places; single dims (VEC = 1) are fetched where they are.
#include <algorithm>
#include <climits>
#include <cstdint>
#include <type_traits>

#include "cuda/lanes.h"
#include "cuda/launch.h"
#include "cuda/permute/cycles.h"
#include "cuda/permute/kernel.h"
#include "cuda/tokens.h"

namespace extrope {
namespace {

constexpr int BLOCK = 128;
constexpr int UNROLL = 4;         // heads in flight
constexpr int INVALID_VALUE = 1;  // cudaErrorInvalidValue, also where no CUDA header is
constexpr int64_t STAGING = BLOCK * UNROLL * 16;

// The heads of q and then of k that take one permutation at one token.
template <typename Word>
struct Heads {
  const PermuteParams& p;
  const Token<uint64_t>& token;
  int row;

  __device__ int count() const {
    return static_cast<int>(p.tensors[0].heads / p.rows + p.tensors[1].heads / p.rows);
  }
  __device__ const PermuteTensor& tensor(int i, int64_t* head) const {
    const int group = static_cast<int>(p.tensors[0].heads / p.rows);
    const PermuteTensor& x = p.tensors[i >= group];
    *head = static_cast<int64_t>(row) * (x.heads / p.rows) + (i >= group ? i - group : i);
    return x;
  }
  __device__ const Word* in(int i) const {
    int64_t head;
    const PermuteTensor& x = tensor(i, &head);
    return static_cast<const Word*>(x.in) + token.batch * x.in_batch + token.seq * x.in_seq +
           head * x.in_head;
  }
  __device__ Word* out(int i) const {
    int64_t head;
    const PermuteTensor& x = tensor(i, &head);
    return static_cast<Word*>(x.out) + token.batch * x.out_batch + token.seq * x.out_seq +
           head * x.out_head;
  }
};

template <typename Word, int VEC>
__device__ inline Lanes<Word, VEC> pick(const Word* row, const int* source) {
  Lanes<Word, VEC> lanes;
  if constexpr (Lanes<Word, VEC>::PACKED) {
#pragma unroll
    for (int j = 0; j < VEC; j += 2) {
      lanes.word[j / 2] = row[source[j]] | static_cast<uint32_t>(row[source[j + 1]]) << 16;
    }
  } else {
#pragma unroll
    for (int j = 0; j < VEC; ++j) lanes.word[j] = row[source[j]];
  }
  return lanes;
}

// Every thread of the block comes here, for the barriers; those without a token are not `valid`.
template <typename Word, int VEC>
__device__ void permute_staged(const Heads<Word>& heads, const int* source, bool valid,
                               Word* rows) {
  const int dim = static_cast<int>(heads.p.head_dim), count = heads.count();
  const int first_dim = VEC * static_cast<int>(threadIdx.x);
  const auto staged = [&](int u) {
    return rows + (u * static_cast<int>(blockDim.y) + static_cast<int>(threadIdx.y)) * dim;
  };
#pragma unroll 1
  for (int first = 0; first < count; first += UNROLL) {
    Lanes<Word, VEC> own[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      if (valid && first + u < count) own[u] = load<Word, VEC>(heads.in(first + u) + first_dim);
    }
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      if (valid && first + u < count) store<Word, VEC>(staged(u) + first_dim, own[u]);
    }
    __syncthreads();
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      if (valid && first + u < count) {
        store<Word, VEC>(heads.out(first + u) + first_dim, pick<Word, VEC>(staged(u), source));
      }
    }
    __syncthreads();
  }
}

template <typename Word>
__device__ void permute_single(const Heads<Word>& heads, int source, int c) {
  const int count = heads.count();
#pragma unroll 1
  for (int first = 0; first < count; first += UNROLL) {
    Word own[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      if (first + u < count) own[u] = heads.in(first + u)[source];
    }
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      if (first + u < count) heads.out(first + u)[c] = own[u];
    }
  }
}

// The blocks per processor are the registers' limit: left to itself, ptxas spills to fit one more.
template <typename Word, int VEC>
__global__ void __launch_bounds__(BLOCK, 6)
    permute_kernel(const __grid_constant__ PermuteParams p, const int tiles) {
  EXTROPE_SHARED(memory);
  const int dim = static_cast<int>(p.head_dim), row = static_cast<int>(blockIdx.y);
  const int tokens = static_cast<int>(p.batch * p.seqlen);
  const int thread = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
  const int64_t search = search_bytes(dim), kept = search > STAGING ? search : STAGING;
  Cycles cycles(memory + (kept + 15) / 16 * 16, dim);
  cycles.find(p.permutations + row * p.permutation_row, memory, thread,
              static_cast<int>(blockDim.x * blockDim.y));
#pragma unroll 1
  for (int tile = static_cast<int>(blockIdx.x); tile < tiles; tile += static_cast<int>(gridDim.x)) {
    const int64_t index = int64_t{tile} * blockDim.y + threadIdx.y;
    const bool valid = index < tokens;
    const Token<uint64_t> token = find_token<uint64_t>(p, valid ? static_cast<int>(index) : 0);
    const bool negative = static_cast<int64_t>(token.position) < 0;
    const uint64_t magnitude = negative ? 0 - token.position : token.position;
    const bool behind = negative != p.inverse;
    const Heads<Word> heads{p, token, row};
    if constexpr (VEC > 1) {
      int source[VEC];
#pragma unroll
      for (int j = 0; j < VEC; ++j) {
        source[j] = cycles.source(VEC * static_cast<int>(threadIdx.x) + j, magnitude, behind);
      }
      permute_staged<Word, VEC>(heads, source, valid, reinterpret_cast<Word*>(memory));
    } else if (valid) {
      for (int c = static_cast<int>(threadIdx.x); c < dim; c += static_cast<int>(blockDim.x)) {
        permute_single<Word>(heads, cycles.source(c, magnitude, behind), c);
      }
    }
  }
}

template <typename Word, int VEC>
int launch(const PermuteParams& p, void* stream, int device) {
  constexpr auto kernel = permute_kernel<Word, VEC>;
  const int64_t tokens = p.batch * p.seqlen;
  if (tokens == 0 || p.tensors[0].heads + p.tensors[1].heads == 0) return 0;
  const int64_t x = std::min<int64_t>(p.head_dim / VEC, BLOCK), y = std::min(BLOCK / x, tokens);
  const int64_t tiles = (tokens + y - 1) / y;
  if (tokens > INT_MAX || p.rows > 65535 || p.num_sequences > INT_MAX) return INVALID_VALUE;
  const int64_t kept = (std::max(search_bytes(p.head_dim), STAGING) + 15) / 16 * 16;
  const int64_t shared = kept + cycles_bytes(p.head_dim);
  // One wave of blocks: each finds the cycles once and goes through its share of the tokens.
  const int64_t blocks = resident_threads<kernel>(BLOCK, device, shared) / BLOCK;
  const int64_t wave = std::max<int64_t>(blocks / p.rows, 1);
  const dim3 grid(static_cast<unsigned>(std::min(tiles, wave)), static_cast<unsigned>(p.rows));
  const dim3 block(static_cast<unsigned>(x), static_cast<unsigned>(y));
  EXTROPE_LAUNCH_SHARED(kernel, grid, block, shared, stream, p, static_cast<int>(tiles));
  return launch_error();
}

// Whether rows can be moved by vectors of 16 bytes, a thread for each.
bool fits(const PermuteParams& p, int vec) {
  if (p.head_dim % vec != 0 || p.head_dim / vec > BLOCK) return false;
  for (int t = 0; t < p.num_tensors; ++t) {
    const PermuteTensor& x = p.tensors[t];
    const uintptr_t addresses =
        reinterpret_cast<uintptr_t>(x.in) | reinterpret_cast<uintptr_t>(x.out);
    if (addresses % 16 != 0) return false;
    if (!multiple(p.batch, x.in_batch, vec) || !multiple(p.batch, x.out_batch, vec) ||
        !multiple(p.seqlen, x.in_seq, vec) || !multiple(p.seqlen, x.out_seq, vec) ||
        !multiple(x.heads, x.in_head, vec) || !multiple(x.heads, x.out_head, vec)) {
      return false;
    }
  }
  return true;
}

template <typename Word>
int choose(const PermuteParams& p, void* stream, int device) {
  constexpr int VEC = 16 / sizeof(Word);
  return fits(p, VEC) ? launch<Word, VEC>(p, stream, device) : launch<Word, 1>(p, stream, device);
}

}  // namespace

int permute_launch(const PermuteParams& p, void* stream, int device) {
  switch (p.element_size) {
    case 2:
      return choose<uint16_t>(p, stream, device);
    case 4:
      return choose<uint32_t>(p, stream, device);
    default:
      return choose<uint64_t>(p, stream, device);
  }
}

const char* permute_error(int error) { return error_text(error); }

}  // namespace extrope
