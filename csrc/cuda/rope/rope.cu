// The fused rotary embedding: the threads of a call and the width of their accesses; worker.h has
// the work of a thread.
//
// A slot is what a thread does at a time for one token: it rotates VEC pairs, or copies VEC dims
// that do not rotate, in its group of the heads of q and k. Axis x of the grid is tiles of tokens,
// axis y groups of heads. HeadGroups: `size` heads of one list, q's then k's; per_head (heads have
// frequencies of their own): group i is head i of both.
#include <algorithm>
#include <climits>
#include <cstdint>
#include <type_traits>

#include "cuda/launch.h"
#include "cuda/rope/kernel.h"
#include "cuda/rope/worker.h"

namespace extrope {
namespace {

constexpr int BLOCK = 128;
constexpr int INVALID_VALUE = 1;  // cudaErrorInvalidValue, for files without CUDA headers too

// The blocks per processor are the registers' limit: without it, ptxas spills to fit one more.
template <typename T, int VEC, bool INTERLEAVED, bool GRAD, bool AXES>
__global__ void __launch_bounds__(BLOCK, GRAD ? 3 : 4)
    rope_kernel(const __grid_constant__ RopeParams p, const HeadGroups groups, const int slots) {
  const unsigned index = blockIdx.x * blockDim.y + threadIdx.y;
  if (index >= static_cast<unsigned>(p.batch * p.seqlen)) return;
  const DeviceToken token = find_token(p, static_cast<int>(index));
  const Worker<T, VEC, INTERLEAVED, GRAD, AXES> worker{p, token, groups};
  const int rotated = static_cast<int>(p.rotary_dim / (2 * VEC));
  for (int slot = threadIdx.x; slot < slots; slot += blockDim.x) {
    if (slot < rotated) {
      worker.rotate(slot);
    } else {
      // Those before the rotated dims, then those after them.
      const int dim = VEC * (slot - rotated) - static_cast<int>(p.rotary_offset);
      worker.copy(dim < 0 ? dim : dim + static_cast<int>(p.rotary_dim));
    }
  }
}

template <typename T, int VEC, bool INTERLEAVED, bool GRAD, bool AXES>
int launch(const RopeParams& p, void* stream, int device) {
  constexpr auto kernel = rope_kernel<T, VEC, INTERLEAVED, GRAD, AXES>;
  const bool wants_grad = p.angle_grad != nullptr;
  bool copies = false;
  int64_t heads = 0, most = 0;
  for (int t = 0; t < p.num_tensors; ++t) {
    copies |= p.tensors[t].in != p.tensors[t].out;
    heads += p.tensors[t].heads;
    most = std::max(most, p.tensors[t].heads);
  }
  const int64_t tokens = p.batch * p.seqlen;
  const int64_t tail = copies ? p.head_dim - p.rotary_dim : 0;
  const int64_t slots = p.rotary_dim / (2 * VEC) + tail / VEC;
  if (tokens == 0 || slots == 0 || (heads == 0 && !wants_grad)) return 0;

  const bool per_head = p.freq_head != 0 || p.angle_heads > 1;
  if (per_head && wants_grad && p.angle_heads < most) return INVALID_VALUE;
  const int64_t listed = std::max<int64_t>(per_head ? most : heads, 1);  // heads to group
  int64_t size = per_head ? 1 : listed;
  if (!per_head && !wants_grad) {  // else one thread sums the angle gradient over all heads
    // Too few tokens to fill the device: more groups, each of whole rounds of the unrolled loop.
    const int64_t wanted = resident_threads<kernel>(BLOCK, device) / (tokens * slots);
    constexpr int64_t ROUND = Worker<T, VEC, INTERLEAVED, GRAD, AXES>::UNROLL;
    if (wanted > 1) size = ((listed + wanted - 1) / wanted + ROUND - 1) / ROUND * ROUND;
  }
  const int64_t x = std::min<int64_t>(slots, BLOCK), y = std::min(BLOCK / x, tokens);
  const int64_t tiles = (tokens + y - 1) / y, num_groups = (listed + size - 1) / size;
  const int64_t extents = std::max({tokens, 2 * p.head_dim, 2 * listed, p.num_sequences});
  if (extents > INT_MAX || num_groups > 65535) return INVALID_VALUE;
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(num_groups));
  const dim3 block(static_cast<unsigned>(x), static_cast<unsigned>(y));
  EXTROPE_LAUNCH(kernel, grid, block, stream, p, HeadGroups{static_cast<int>(size), per_head},
                 static_cast<int>(slots));
  return launch_error();
}

// Returns true if every access of `vec` elements stays aligned and inside its half of the dims.
bool fits(const RopeParams& p, int vec, int bytes) {
  if (p.rotary_dim / 2 % vec != 0 || p.head_dim % vec != 0) return false;
  if (p.rotary_offset % vec != 0) return false;
  for (int t = 0; t < p.num_tensors; ++t) {
    const RopeTensor& x = p.tensors[t];
    const uintptr_t addresses = reinterpret_cast<uintptr_t>(x.in) |
                                reinterpret_cast<uintptr_t>(x.out) |
                                reinterpret_cast<uintptr_t>(x.saved);
    if (addresses % (vec * bytes) != 0) return false;
    for (const int64_t stride : {x.in_batch, x.out_batch, x.saved_batch}) {
      if (!multiple(p.batch, stride, vec)) return false;
    }
    for (const int64_t stride : {x.in_seq, x.out_seq, x.saved_seq}) {
      if (!multiple(p.seqlen, stride, vec)) return false;
    }
    for (const int64_t stride : {x.in_head, x.out_head, x.saved_head}) {
      if (!multiple(x.heads, stride, vec)) return false;
    }
  }
  return true;
}

template <typename T, bool AXES>
int choose(RopeParams p, void* stream, int device) {
  constexpr int VEC = 16 / sizeof(T);
  // From here on rows begin at their first rotated dim: so a thread needs no register for it.
  for (RopeTensor& x : p.tensors) {
    if (x.in == nullptr) continue;
    x.in = static_cast<const T*>(x.in) + p.rotary_offset;
    x.out = static_cast<T*>(x.out) + p.rotary_offset;
    if (x.saved != nullptr) x.saved = static_cast<const T*>(x.saved) + p.rotary_offset;
  }
  // One-element accesses serve rare calls: double, for gradcheck and references, and the angle
  // gradient of positions by axis. That one kernel takes both layouts, INTERLEAVED or not.
  if constexpr (!std::is_same_v<T, double>) {
    if (fits(p, VEC, sizeof(T))) {
      if (p.angle_grad == nullptr) {
        return p.interleaved ? launch<T, VEC, true, false, AXES>(p, stream, device)
                             : launch<T, VEC, false, false, AXES>(p, stream, device);
      }
      if constexpr (!AXES) {
        return p.interleaved ? launch<T, VEC, true, true, false>(p, stream, device)
                             : launch<T, VEC, false, true, false>(p, stream, device);
      }
    }
  }
  return launch<T, 1, false, true, true>(p, stream, device);
}

template <bool AXES>
int choose_type(const RopeParams& p, void* stream, int device) {
  switch (p.dtype) {
    case DType::f32:
      return choose<float, AXES>(p, stream, device);
    case DType::f64:
      return choose<double, AXES>(p, stream, device);
    case DType::bf16:
      return choose<__nv_bfloat16, AXES>(p, stream, device);
    default:
      return choose<__half, AXES>(p, stream, device);
  }
}

}  // namespace

int rope_launch(const RopeParams& p, void* stream, int device) {
  return p.axes != nullptr ? choose_type<true>(p, stream, device)
                           : choose_type<false>(p, stream, device);
}

const char* rope_error(int error) { return error_text(error); }

}  // namespace extrope
