// RMSNorm and the rotation, backward, and the sums of the weights' gradients.
#include "cuda/rope/norm_backward.h"
#include "cuda/rope/norm_kernel.h"

namespace extrope {
namespace {

constexpr int SUM_DIMS = 32, SUM_ROWS = 8;  // of a block that sums parts

// Parts y, y + SUM_ROWS, ... by a thread each, then the threads' sums in order: in double.
template <typename Acc>
__global__ void __launch_bounds__(SUM_DIMS* SUM_ROWS)
    norm_sum_kernel(const Acc* parts, int64_t count, int64_t stride, int64_t dims, Acc* out) {
  EXTROPE_SHARED(memory);
  double* rows = reinterpret_cast<double*>(memory);
  const int64_t dim = int64_t{blockIdx.x} * SUM_DIMS + threadIdx.x;
  double sum = 0;
  if (dim < dims) {
    for (int64_t part = threadIdx.y; part < count; part += SUM_ROWS) {
      sum += parts[part * stride + dim];
    }
  }
  rows[threadIdx.y * SUM_DIMS + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || dim >= dims) return;
  for (int row = 1; row < SUM_ROWS; ++row) sum += rows[row * SUM_DIMS + threadIdx.x];
  out[dim] = static_cast<Acc>(sum);
}

template <typename Acc>
int sum_parts(const RopeNormParams& p, int64_t count, const int64_t* dims, void* const* grads,
              void* stream) {
  for (int n = 0; n < p.num_tensors; ++n) {
    if (dims[n] == 0) continue;
    const dim3 grid(static_cast<unsigned>((dims[n] + SUM_DIMS - 1) / SUM_DIMS));
    EXTROPE_LAUNCH_SHARED(norm_sum_kernel<Acc>, grid, dim3(SUM_DIMS, SUM_ROWS),
                          SUM_DIMS * SUM_ROWS * sizeof(double), stream,
                          static_cast<const Acc*>(p.norm_parts[n]), count, p.norm_part_stride,
                          dims[n], static_cast<Acc*>(grads[n]));
    if (const int error = launch_error(); error != 0) return error;
  }
  return 0;
}

// In shared memory where it has room beside what else is there; else in the parts, a copy for all,
// each element of which has to be one thread's own.
template <typename Acc>
WeightSums place_sums(NormOperand& of, int64_t table) {
  WeightSums kept{};
  if (of.norm.weight == nullptr) return kept;
  kept.dims = of.norm.all_heads ? of.x.heads * of.head_dim : of.head_dim;
  kept.copies = int64_t{of.tokens} * (of.norm.all_heads ? 1 : of.rows);
  const int64_t others = table + 2 * int64_t{of.tokens} * of.rows;
  kept.shared = (others + kept.copies * kept.dims) * sizeof(Acc) <= NORM_SHARED_BYTES;
  if (kept.shared) return kept;
  of.tokens = 1, kept.copies = 1;
  if (!of.norm.all_heads) of.rows = 1;
  return kept;
}

template <typename T, int VEC>
int launch_backward(const RopeNormParams& p, NormCall call, void* stream) {
  using Acc = Accumulator<T>;
  constexpr auto kernel = norm_backward_kernel<T, VEC>;
  const int64_t tokens = p.batch * p.seqlen;
  NormParts parts{{}, {p.norm_parts[0], p.norm_parts[1]}, p.norm_part_tokens, p.norm_part_stride};
  int64_t shared = 0;
  for (int n = 0; n < p.num_tensors; ++n) {
    NormOperand& of = call.of[n];
    if (of.head_dim > kMaxNormedDim || of.x.heads * of.head_dim > INT_MAX) return INVALID_VALUE;
    const bool per_head = p.freq_head != 0;
    parts.sums[n] = place_sums<Acc>(of, table_size(of, per_head));
    const WeightSums& kept = parts.sums[n];
    const int64_t elements = table_size(of, per_head) + 2 * int64_t{of.tokens} * of.rows +
                             (kept.shared ? kept.copies * kept.dims : 0);
    shared = std::max<int64_t>(shared, elements * sizeof(Acc));
  }
  if (tokens > INT_MAX || p.num_sequences > INT_MAX) return INVALID_VALUE;
  const int64_t count = (tokens + parts.tokens - 1) / parts.tokens;
  const dim3 grid(static_cast<unsigned>(count), static_cast<unsigned>(p.num_tensors));
  EXTROPE_LAUNCH_SHARED(kernel, grid, dim3(NORM_BLOCK), shared, stream, call, parts);
  return launch_error();
}

}  // namespace

int rope_norm_backward_launch(const RopeNormParams& p, void* stream) {
  if (p.batch * p.seqlen == 0) return 0;
  return choose_type(p, [&]<typename T, int VEC>(const NormCall& call) {
    return launch_backward<T, VEC>(p, call, stream);
  });
}

int rope_norm_sum_launch(const RopeNormParams& p, int64_t count, const int64_t* dims,
                         void* const* grads, void* stream) {
  return p.dtype == DType::f64 ? sum_parts<double>(p, count, dims, grads, stream)
                               : sum_parts<float>(p, count, dims, grads, stream);
}

}  // namespace extrope
