// The backward of the norm and the rotation. With g the gradient rotated back and n = x / rms(x):
//
//   dx = (g * weight - n * mean(g * weight * n)) / rms(x),  d weight = the sum of g * n over rows
//
// A block has one tensor (blockIdx.y) of the tokens of one part, and sums its gradient of the
// weights: in shared memory, or, where there is not enough of it, in its row of the parts. Every
// sum is one thread's own until the end, and the rows of a block are then added in order: the bits
// are the same in every run.
#pragma once

#include "cuda/rope/norm_call.h"

namespace extrope {

constexpr int64_t NORM_SHARED_BYTES = 48 << 10;  // that any kernel may have

// The weights' gradient of one tensor in a block: `copies` rows of `dims`.
struct WeightSums {
  int64_t dims, copies;
  bool shared;
};

// The parts of RopeNormParams, and how a block sums its own.
struct NormParts {
  WeightSums sums[2];
  void* at[2];
  int64_t tokens, stride;
};

template <typename T, int VEC>
struct NormBackward {
  using Acc = Accumulator<T>;
  using Own = Owned<T, VEC>;
  struct Pair {
    Acc squares, products;  // of x; of x, weight and g
  };

  const NormCall& call;
  const NormOperand& of;
  const Seat seat;
  const CosSin<Acc> angles;
  Acc* partial;  // in shared memory: two sums for each row of the block
  Acc* sums;     // this thread's row of the weights' gradient; nullptr: no weights
  int slots, rounds;
  const Token<double> token;
  const bool valid;

  __device__ int head_of(int round) const { return seat.row + round * of.rows; }
  __device__ bool exists(int round) const { return valid && head_of(round) < of.x.heads; }
  __device__ Slot slot_at(int index) const {
    return find_slot<VEC>(of, index, call.rope.interleaved);
  }
  __device__ const T* grad_of(int round) const {
    return static_cast<const T*>(of.x.in) + token.batch * of.x.in_batch + token.seq * of.x.in_seq +
           head_of(round) * of.x.in_head;
  }
  __device__ const T* saved_of(int round) const {
    return static_cast<const T*>(of.x.saved) + token.batch * of.x.saved_batch +
           token.seq * of.x.saved_seq + head_of(round) * of.x.saved_head;
  }
  __device__ T* out_of(int round) const {
    return static_cast<T*>(of.x.out) + token.batch * of.x.out_batch + token.seq * of.x.out_seq +
           head_of(round) * of.x.out_head;
  }
  __device__ int64_t first_weight(int round) const {
    return of.norm.all_heads ? int64_t{head_of(round)} * of.head_dim : 0;
  }

  // g and, for a norm, x of a slot, widened; 0 where there is no dim.
  __device__ void read(int round, const Slot& slot, Acc* g, Acc* x) const {
    const Own grad = load_slot<T, VEC>(grad_of(round), slot);
    Own saved{};
    if (sums != nullptr) saved = load_slot<T, VEC>(saved_of(round), slot);
    grad.widen_to(g);
    saved.widen_to(x);
    if (slot.rotated) rotate_slot<VEC>(angles, slot.index, call.rope.interleaved, g);
  }

  __device__ Pair sums_of_slot(const Acc* g, const Acc* x, const Acc* weight) const {
    Pair sum{squares_of<VEC>(x), 0};
#pragma unroll
    for (int j = 0; j < 2 * VEC; ++j) sum.products = fma(x[j] * weight[j], g[j], sum.products);
    return sum;
  }

  __device__ Pair over_lanes(Pair sum) const {
#pragma unroll 1
    for (int step = of.lanes / 2; step > 0; step /= 2) {
      sum.squares += __shfl_xor_sync(0xffffffffu, sum.squares, step);
      sum.products += __shfl_xor_sync(0xffffffffu, sum.products, step);
    }
    return sum;
  }

  // One over the root mean square, and the mean of weight * g * n.
  __device__ Pair scales_of(Pair sum, int64_t count) const {
    const Acc share = static_cast<Acc>(count);
    const Acc scale = Acc{1} / root(sum.squares / share + static_cast<Acc>(call.norm_eps));
    return {scale, sum.products * scale / share};
  }

  __device__ Pair scales_of_all() const {
    Pair sum{};
#pragma unroll 1
    for (int round = 0; round < rounds; ++round) {
      fill_row(round);
      if (!exists(round)) continue;
#pragma unroll 1
      for (int index = seat.lane; index < slots; index += of.lanes) {
        const Slot slot = slot_at(index);
        Acc g[2 * VEC], x[2 * VEC], weight[2 * VEC] = {};
        read(round, slot, g, x);
        load_weights<VEC>(of.norm, first_weight(round), slot, weight);
        const Pair more = sums_of_slot(g, x, weight);
        sum.squares += more.squares, sum.products += more.products;
      }
    }
    sum = over_lanes(sum);
    Pair* rows = reinterpret_cast<Pair*>(partial) + seat.token * of.rows;
    const bool here = seat.token < of.tokens;
    if (here && seat.lane == 0) rows[seat.row] = sum;
    __syncthreads();
    sum = {};
    for (int row = 0; here && row < of.rows; ++row) {
      sum.squares += rows[row].squares, sum.products += rows[row].products;
    }
    return scales_of(sum, of.x.heads * of.head_dim);
  }

  __device__ void fill_row(int round) const {
    angles.fill_head(call.rope, token, exists(round) ? head_of(round) : -1, of, seat.lane);
  }

  __device__ void add_to_weights(int round, int dim, const Acc* terms) const {
    constexpr int PIECE = VEC < static_cast<int>(16 / sizeof(Acc)) ? VEC : 16 / sizeof(Acc);
    Acc* to = sums + first_weight(round) + dim;
#pragma unroll
    for (int j = 0; j < VEC; j += PIECE) {
      Acc own[PIECE];
      unpack(load<Acc, PIECE>(to + j), own);
#pragma unroll
      for (int i = 0; i < PIECE; ++i) own[i] += terms[j + i];
      Lanes<Acc, PIECE> lanes;
      pack(own, lanes);
      store<Acc, PIECE>(to + j, lanes);
    }
  }

  // The gradients of a slot's dims and weights.
  __device__ void finish(int round, const Slot& slot, Acc* g, const Acc* x, const Acc* weight,
                         Pair scales) const {
    if (sums != nullptr) {
      Acc terms[2 * VEC];
#pragma unroll
      for (int j = 0; j < 2 * VEC; ++j) {
        const Acc normal = x[j] * scales.squares;
        terms[j] = g[j] * normal;
        g[j] = scales.squares * fma(g[j], weight[j], -(normal * scales.products));
      }
      add_to_weights(round, slot.a, terms);
      if (slot.b >= 0) add_to_weights(round, slot.b, terms + VEC);
    }
    Own own;
    pack(g, own.half[0]);
    pack(g + VEC, own.half[1]);
    T* to = out_of(round);
    store<T, VEC>(to + slot.a, own.half[0]);
    if (slot.b >= 0) store<T, VEC>(to + slot.b, own.half[1]);
  }

  // A head whose lanes have a slot each.
  __device__ void row_of_vectors(int round, const Slot& slot, Pair scales, Acc* weight) const {
    const bool here = seat.lane < slots && exists(round);
    Acc g[2 * VEC] = {}, x[2 * VEC] = {};
    if (here) read(round, slot, g, x);
    if (here && of.norm.all_heads) load_weights<VEC>(of.norm, first_weight(round), slot, weight);
    if (sums != nullptr && !of.norm.all_heads) {
      scales = scales_of(over_lanes(sums_of_slot(g, x, weight)), of.head_dim);
    }
    if (here) finish(round, slot, g, x, weight, scales);
  }

  // Slots after slots, read once more for the store.
  __device__ void row_of_elements(int round, Pair scales) const {
    const bool each = sums != nullptr && !of.norm.all_heads, here = exists(round);
    Pair sum{};
#pragma unroll 1
    for (int pass = each ? 0 : 1; pass < 2; ++pass) {
      if (each && pass == 1) scales = scales_of(over_lanes(sum), of.head_dim);
#pragma unroll 1
      for (int index = seat.lane; here && index < slots; index += of.lanes) {
        const Slot slot = slot_at(index);
        Acc g[2 * VEC], x[2 * VEC], weight[2 * VEC] = {};
        read(round, slot, g, x);
        if (sums != nullptr) load_weights<VEC>(of.norm, first_weight(round), slot, weight);
        if (pass == 1) {
          finish(round, slot, g, x, weight, scales);
        } else {
          const Pair more = sums_of_slot(g, x, weight);
          sum.squares += more.squares, sum.products += more.products;
        }
      }
    }
  }

  // The tokens that the block has at once.
  __device__ void run(const Slot& slot, Acc* weight) const {
    __syncthreads();  // what the last tokens left in shared memory is read
    if (of.rotary_dim > 0 && !angles.per_head && valid) {
      angles.fill(call.rope, token, 0, of.x.decay_sign, seat.row * of.lanes + seat.lane,
                  of.rows * of.lanes);
    }
    __syncthreads();
    const Pair scales =
        sums != nullptr && of.norm.all_heads ? scales_of_all() : Pair{Acc{1}, Acc{0}};
#pragma unroll 1
    for (int round = 0; round < rounds; ++round) {
      fill_row(round);
      if constexpr (VEC > 1) {
        row_of_vectors(round, slot, scales, weight);
      } else {
        row_of_elements(round, scales);
      }
    }
  }
};

// The blocks per processor are the registers' limit.
template <typename T, int VEC>
__global__ void __launch_bounds__(NORM_BLOCK, 4)
    norm_backward_kernel(const __grid_constant__ NormCall call,
                         const __grid_constant__ NormParts parts) {
  EXTROPE_SHARED(memory);
  using Acc = Accumulator<T>;
  const int operand = static_cast<int>(blockIdx.y);
  const NormOperand& of = call.of[operand];
  const WeightSums& kept = parts.sums[operand];
  const bool per_head = call.rope.freq_head != 0;
  const int64_t tokens = call.rope.batch * call.rope.seqlen;
  const int64_t begin = int64_t{blockIdx.x} * parts.tokens;
  const int64_t end = begin + parts.tokens < tokens ? begin + parts.tokens : tokens;
  Acc* table = reinterpret_cast<Acc*>(memory);
  Acc* partial = table + table_size(of, per_head);
  Acc* part = static_cast<Acc*>(parts.at[operand]) + blockIdx.x * parts.stride;
  Acc* sums = nullptr;
  const Seat seat = find_seat(of);
  const bool seated = seat.token < of.tokens;
  const int copy = of.norm.all_heads ? seat.token : seat.token * of.rows + seat.row;
  if (of.norm.weight != nullptr) {
    sums = kept.shared ? partial + 2 * of.tokens * of.rows : part;
    for (int64_t i = threadIdx.x; i < kept.copies * kept.dims; i += NORM_BLOCK) sums[i] = 0;
  }
  Acc* own = sums == nullptr || !seated ? sums : sums + copy * kept.dims;
  const CosSin<Acc> angles(table, of, seated ? seat : Seat{0, 0, 0}, per_head);
  const int slots = count_slots(of, VEC);
  const int rounds = static_cast<int>((of.x.heads + of.rows - 1) / of.rows);
  const bool has_slot = VEC > 1 && seat.lane < slots;
  const Slot slot = find_slot<VEC>(of, has_slot ? seat.lane : 0, call.rope.interleaved);
  Acc weight[2 * VEC] = {};
  if (has_slot && sums != nullptr && !of.norm.all_heads) {
    load_weights<VEC>(of.norm, 0, slot, weight);
  }
#pragma unroll 1
  for (int64_t first = begin; first < end; first += of.tokens) {
    const bool valid = seated && first + seat.token < end;
    const Token<double> token = call.token(static_cast<int>(valid ? first + seat.token : first));
    const NormBackward<T, VEC> worker{call, of,    seat,   angles, partial,
                                      own,  slots, rounds, token,  valid};
    worker.run(slot, weight);
  }
  if (sums == nullptr || !kept.shared) return;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < kept.dims; i += NORM_BLOCK) {
    Acc sum = 0;
    for (int64_t row = 0; row < kept.copies; ++row) sum += sums[row * kept.dims + i];
    part[i] = sum;
  }
}

}  // namespace extrope
