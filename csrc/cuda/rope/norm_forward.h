// The norm and the rotation, forward, of rows on their way to `Call`'s outputs: the kernels of the
// rotation with a norm before it and of the fused step into a cache.
//
// A block has one tensor (blockIdx.y) of a few tokens. Its threads hold their dims in registers
// between the sum of squares and the store: memory is read once. Where all heads of a token share
// a mean square, the block sums it in shared memory.
//
// A Call has `rope`, the RopeParams that say by what to rotate, `norm_eps`, operands `of`, and
//   Token<double> token(int index)          where token `index` is, and its position
//   RowTarget target<T>(operand, token, index)  where its heads go
#pragma once

#include <climits>

#include "cuda/launch.h"
#include "cuda/rope/norm_kernel.h"
#include "cuda/rope/norm_rows.h"

namespace extrope {

// Heads of one token: where the first is, how far apart they are.
struct RowTarget {
  void* at;  // nullptr: written nowhere
  int64_t head;
  const float* scale;  // of each head, where they are written in e4m3: else nullptr
};

template <typename T, int VEC, typename Call>
struct NormForward {
  using Acc = Accumulator<T>;
  using Own = Owned<T, VEC>;
  static constexpr int HELD = VEC > 1 ? 2 : 1;  // heads that a thread holds, or has in flight

  const Call& call;
  const NormOperand& of;
  const Seat seat;
  const Token<double> token;
  const T* in;       // of the token's first head
  RowTarget target;  // nowhere for a token that does not exist, too
  bool valid;
  CosSin<Acc> angles;
  Acc* partial;  // in shared memory: a sum for each row of the block
  int slots, rounds;

  __device__ int head_of(int round) const { return seat.row + round * of.rows; }
  __device__ bool exists(int round) const { return valid && head_of(round) < of.x.heads; }
  __device__ Slot slot_at(int index) const {
    return find_slot<VEC>(of, index, call.rope.interleaved);
  }
  __device__ const T* row_of(int round) const { return in + head_of(round) * of.x.in_head; }

  __device__ static Acc squares_of_own(const Own& own) {
    Acc dims[2 * VEC];
    own.widen_to(dims);
    return squares_of<VEC>(dims);
  }

  // Of a head, this lane's part.
  __device__ Acc squares_of_row(int round) const {
    Acc squares = 0;
    if (!exists(round)) return squares;
#pragma unroll 1
    for (int index = seat.lane; index < slots; index += of.lanes) {
      squares += squares_of_own(load_slot<T, VEC>(row_of(round), slot_at(index)));
    }
    return squares;
  }

  __device__ void load_rows(int first, const Slot& slot, Own* held) const {
#pragma unroll
    for (int u = 0; u < HELD; ++u) {
      held[u] = Own{};
      if (seat.lane < slots && exists(first + u)) {
        held[u] = load_slot<T, VEC>(row_of(first + u), slot);
      }
    }
  }

  __device__ Acc inverse_rms(Acc squares, int64_t count) const {
    return Acc{1} / root(squares / static_cast<Acc>(count) + static_cast<Acc>(call.norm_eps));
  }

  // One over the root mean square of all heads of the token, with the block's barriers.
  __device__ Acc scale_of_all(Acc squares) const {
    squares = sum_over_lanes(squares, of.lanes);
    Acc* rows = partial + seat.token * of.rows;
    if (seat.lane == 0 && seat.token < of.tokens) rows[seat.row] = squares;
    __syncthreads();
    Acc sum = 0;
    if (seat.token < of.tokens) {
      for (int row = 0; row < of.rows; ++row) sum += rows[row];
    }
    return inverse_rms(sum, of.x.heads * of.head_dim);
  }

  __device__ void put(int head, int dim, const Lanes<T, VEC>& lanes) const {
    const int64_t at = head * target.head + dim;
    if constexpr (Call::QUANTIZES) {
      if (target.scale != nullptr) return Call::quantize(target, head, at, lanes);
    }
    store<T, VEC>(static_cast<T*>(target.at) + at, lanes);
  }

  // `dims`, weighted, rotated and stored.
  __device__ void finish(int round, const Slot& slot, const Acc* weight, Acc scale, Own own) const {
    if (of.norm.weight != nullptr || slot.rotated) {  // others go as they are, bit for bit
      Acc dims[2 * VEC];
      own.widen_to(dims);
      if (of.norm.weight != nullptr) {
#pragma unroll
        for (int j = 0; j < 2 * VEC; ++j) dims[j] = dims[j] * scale * weight[j];
      }
      if (slot.rotated) rotate_slot<VEC>(angles, slot.index, call.rope.interleaved, dims);
      pack(dims, own.half[0]);
      pack(dims + VEC, own.half[1]);
    }
    put(head_of(round), slot.a, own.half[0]);
    if (slot.b >= 0) put(head_of(round), slot.b, own.half[1]);
  }

  __device__ int64_t first_weight(int round) const {
    return of.norm.all_heads ? int64_t{head_of(round)} * of.head_dim : 0;
  }

  // Before the rounds: cosines and sines, and the mean square that all heads share.
  __device__ Acc prepare(const Own* held, bool has_held) const {
    if (of.rotary_dim > 0 && !angles.per_head && seat.token < of.tokens) {
      angles.fill(call.rope, token, 0, of.x.decay_sign, seat.row * of.lanes + seat.lane,
                  of.rows * of.lanes);
    }
    Acc scale = 1;
    if (of.norm.weight != nullptr && of.norm.all_heads) {
      Acc squares = 0;
#pragma unroll
      for (int u = 0; u < HELD; ++u) {
        if (has_held) squares += squares_of_own(held[u]);
      }
#pragma unroll 1
      for (int round = has_held ? HELD : 0; round < rounds; ++round) {
        squares += squares_of_row(round);
      }
      scale = scale_of_all(squares);
    }
    __syncthreads();
    return scale;
  }

  __device__ void fill_row(int round) const {
    angles.fill_head(call.rope, token, exists(round) ? head_of(round) : -1, of, seat.lane);
  }

  // A slot for each lane.
  __device__ void run_vectors() const {
    const Slot slot = slot_at(seat.lane < slots ? seat.lane : 0);
    const bool each = of.norm.weight != nullptr && !of.norm.all_heads;
    Own held[HELD];
    load_rows(0, slot, held);
    Acc weight[2 * VEC] = {}, scale[HELD];
    if (each && seat.lane < slots) load_weights<VEC>(of.norm, 0, slot, weight);
    const Acc of_all = prepare(held, true);
#pragma unroll 1
    for (int first = 0; first < rounds; first += HELD) {
      if (first > 0) load_rows(first, slot, held);
#pragma unroll
      for (int u = 0; u < HELD; ++u) scale[u] = each ? squares_of_own(held[u]) : of_all;
      if (each) {
#pragma unroll 1
        for (int step = of.lanes / 2; step > 0; step /= 2) {
#pragma unroll
          for (int u = 0; u < HELD; ++u) {
            scale[u] += __shfl_xor_sync(0xffffffffu, scale[u], step);
          }
        }
#pragma unroll
        for (int u = 0; u < HELD; ++u) scale[u] = inverse_rms(scale[u], of.head_dim);
      }
#pragma unroll
      for (int u = 0; u < HELD; ++u) {
        if (first + u >= rounds) break;
        fill_row(first + u);
        if (seat.lane >= slots || !exists(first + u) || target.at == nullptr) continue;
        if (of.norm.all_heads) load_weights<VEC>(of.norm, first_weight(first + u), slot, weight);
        finish(first + u, slot, weight, scale[u], held[u]);
      }
    }
  }

  // Slots after slots, read once more for the store.
  __device__ void run_elements() const {
    const bool each = of.norm.weight != nullptr && !of.norm.all_heads;
    const Acc of_all = prepare(nullptr, false);
#pragma unroll 1
    for (int round = 0; round < rounds; ++round) {
      Acc scale = of_all;
      if (each) {
        scale = inverse_rms(sum_over_lanes(squares_of_row(round), of.lanes), of.head_dim);
      }
      fill_row(round);
      if (!exists(round) || target.at == nullptr) continue;
#pragma unroll 1
      for (int index = seat.lane; index < slots; index += of.lanes) {
        const Slot slot = slot_at(index);
        Acc weight[2 * VEC] = {};
        if (of.norm.weight != nullptr) {
          load_weights<VEC>(of.norm, first_weight(round), slot, weight);
        }
        finish(round, slot, weight, scale, load_slot<T, VEC>(row_of(round), slot));
      }
    }
  }
};

// The blocks per processor are the registers' limit.
template <typename T, int VEC, typename Call>
__global__ void __launch_bounds__(NORM_BLOCK, 4)
    norm_forward_kernel(const __grid_constant__ Call call) {
  EXTROPE_SHARED(memory);
  using Acc = Accumulator<T>;
  const NormOperand& of = call.of[blockIdx.y];
  const Seat seat = find_seat(of);
  const int tokens = static_cast<int>(call.rope.batch * call.rope.seqlen);
  const int64_t first = int64_t{blockIdx.x} * of.tokens;
  if (first >= tokens || of.x.heads == 0) return;
  const bool valid = seat.token < of.tokens && first + seat.token < tokens;
  const int index = static_cast<int>(valid ? first + seat.token : first);
  const Token<double> token = call.token(index);
  const T* in =
      static_cast<const T*>(of.x.in) + token.batch * of.x.in_batch + token.seq * of.x.in_seq;
  const RowTarget target = call.template target<T>(static_cast<int>(blockIdx.y), token, index);
  const bool per_head = call.rope.freq_head != 0;
  Acc* table = reinterpret_cast<Acc*>(memory);
  Acc* partial = table + table_size(of, per_head);
  const NormForward<T, VEC, Call> worker{
      call,
      of,
      seat,
      token,
      in,
      target,
      valid,
      CosSin<Acc>(table, of, seat.token < of.tokens ? seat : Seat{0, 0, 0}, per_head),
      partial,
      count_slots(of, VEC),
      static_cast<int>((of.x.heads + of.rows - 1) / of.rows)};
  if constexpr (VEC > 1) {
    worker.run_vectors();
  } else {
    worker.run_elements();
  }
}

// Enqueues it, or returns an error.
template <typename T, int VEC, typename Call>
int launch_norm_forward(const Call& call, int operands, void* stream) {
  using Acc = Accumulator<T>;
  constexpr auto kernel = norm_forward_kernel<T, VEC, Call>;
  const int64_t tokens = call.rope.batch * call.rope.seqlen;
  int64_t tiles = 0, shared = 0;
  for (int n = 0; n < operands; ++n) {
    const NormOperand& of = call.of[n];
    if (of.head_dim > kMaxNormedDim || of.x.heads * of.head_dim > INT_MAX) return INVALID_VALUE;
    if (of.x.heads == 0) continue;
    tiles = std::max(tiles, (tokens + of.tokens - 1) / of.tokens);
    const int64_t sums = int64_t{of.tokens} * of.rows;
    const int64_t elements = table_size(of, call.rope.freq_head != 0) + sums;
    shared = std::max<int64_t>(shared, elements * sizeof(Acc));
  }
  if (tiles == 0) return 0;
  if (tokens > INT_MAX || call.rope.num_sequences > INT_MAX) return INVALID_VALUE;
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(operands));
  EXTROPE_LAUNCH_SHARED(kernel, grid, dim3(NORM_BLOCK), shared, stream, call);
  return launch_error();
}

}  // namespace extrope
