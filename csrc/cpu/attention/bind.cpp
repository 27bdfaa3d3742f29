// Registers the CPU kernels of the attention over regions and splits their work over torch's
// threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <new>
#include <thread>
#include <tuple>

#include "cpu/attention/args.h"
#include "cpu/attention/kernels.h"
#include "cpu/runtime/capability.h"
#include "cpu/runtime/output_pages.h"

namespace extrope {

void wait_for_keys(const KeysDone* previous, int64_t key) {
  if (!previous) return;
  constexpr int kSpins = 256;  // then the core may be better used by the thread that is waited for
  for (int i = 0; previous->load(std::memory_order_acquire) < key; ++i) {
    if (i >= kSpins) std::this_thread::yield();
  }
}

namespace attention {
namespace {

using torch::stable::new_empty;
using Tensors = std::vector<Tensor>;

// Products of a query and a key element, below which waking other threads costs more than it saves.
constexpr int64_t kSmallWork = 1 << 20;
constexpr int64_t kZeroGrain = 1 << 18;  // floats

struct Kernels {
  PlanTiles plan, backward_plan;
  ForwardTile tile;
  BackwardTile backward_tile;
};

#define EXTROPE_KERNELS(isa)                                                   \
  Kernels {                                                                    \
    attention_plan_##isa, attention_backward_plan_##isa, attention_tile_##isa, \
        attention_backward_tile_##isa                                          \
  }

Kernels kernels(DType dtype) {
#if defined(EXTROPE_HAS_BF16)
#define EXTROPE_BF16_KERNELS(isa)                                               \
  Kernels {                                                                     \
    attention_plan_##isa, attention_backward_plan_avx512, attention_tile_##isa, \
        attention_backward_tile_avx512                                          \
  }
  if (dtype == DType::bf16 && capability() >= kAvx512Bf16) {
    return EXTROPE_WIDEST_BF16(EXTROPE_BF16_KERNELS);
  }
#endif
  return EXTROPE_WIDEST(EXTROPE_KERNELS);
}

// All tiles, those of one sequence and one head of k next to each other and their rows rising.
std::vector<QueryTile> cut(const AttentionParams& p, int64_t rows) {
  std::vector<QueryTile> tiles;
  const int64_t sequences = p.cu_seqlens ? p.num_sequences : p.batch;
  for (int64_t s = 0; s < sequences; ++s) {
    QueryTile tile{};
    tile.batch = p.cu_seqlens ? 0 : s;
    tile.seqlen_q = p.cu_seqlens ? p.cu_seqlens[s + 1] - p.cu_seqlens[s] : p.seqlen_q;
    tile.seqlen_k = p.cu_seqlens ? tile.seqlen_q : p.seqlen_k;
    tile.token_q = tile.token_k = p.cu_seqlens ? p.cu_seqlens[s] : 0;
    for (tile.head = 0; tile.head < p.heads_k; ++tile.head) {
      for (tile.row = 0; tile.row < tile.seqlen_q; tile.row += rows) {
        tile.rows = std::min(rows, tile.seqlen_q - tile.row);
        tiles.push_back(tile);
      }
    }
  }
  return tiles;
}

struct Aligned {
  void operator()(float* x) const { ::operator delete[](x, std::align_val_t{64}); }
};

// Runs work(index, workspace) for every index below `count`, started in that order.
template <typename Work>
void run(const AttentionParams& p, int64_t count, int64_t workspace, const Work& work) {
  const int64_t products = p.batch * p.heads_q * p.seqlen_q * p.seqlen_k * p.head_dim;
  const int64_t threads =
      products < kSmallWork ? 1 : std::min<int64_t>(torch::stable::get_num_threads(), count);
  std::unique_ptr<float[], Aligned> memory(
      new (std::align_val_t{64}) float[static_cast<size_t>(threads * workspace)]);
  std::atomic<int64_t> next{0};
  const auto drain = [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
        work(i, memory.get() + slot * workspace);
      }
    }
  };
  threads == 1 ? drain(0, 1) : torch::stable::parallel_for(0, threads, 1, drain);
}

void run_forward(const AttentionParams& p) {
  const Kernels kernel = kernels(p.dtype);
  const TilePlan plan = kernel.plan(p);
  std::vector<QueryTile> tiles = cut(p, plan.rows);
  if (tiles.empty()) return;
  // Late rows see most keys: the longest tiles come first within a head, so that none is left over
  // for one thread at the end.
  std::reverse(tiles.begin(), tiles.end());
  run(p, static_cast<int64_t>(tiles.size()), plan.workspace,
      [&](int64_t i, float* workspace) { kernel.tile(p, tiles[i], plan, workspace); });
}

bool follows(const QueryTile& tile, const QueryTile& previous) {
  return tile.batch == previous.batch && tile.token_q == previous.token_q &&
         tile.head == previous.head && tile.row > previous.row;
}

// In which order tiles start: those of as many heads as there are threads in turn, so that threads
// seldom wait for each other's sums, nor fetch them from each other's caches.
std::vector<int64_t> by_turns(const std::vector<QueryTile>& tiles) {
  std::vector<int64_t> order(tiles.size()), chain(tiles.size());
  for (size_t i = 0; i < tiles.size(); ++i) {
    order[i] = static_cast<int64_t>(i);
    if (i > 0) chain[i] = chain[i - 1] + !follows(tiles[i], tiles[i - 1]);
  }
  const int64_t threads = torch::stable::get_num_threads();
  const auto rank = [&](int64_t i) { return std::pair(chain[i] / threads, tiles[i].row); };
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return rank(a) < rank(b); });
  return order;
}

void run_backward(const AttentionParams& p) {
  const Kernels kernel = kernels(p.dtype);
  const TilePlan plan = kernel.backward_plan(p);
  const std::vector<QueryTile> tiles = cut(p, plan.rows);
  if (tiles.empty()) return;
  const std::unique_ptr<KeysDone[]> done(new KeysDone[tiles.size()]());
  const std::vector<int64_t> order = by_turns(tiles);
  run(p, static_cast<int64_t>(tiles.size()), plan.workspace, [&](int64_t n, float* workspace) {
    const int64_t i = order[n];
    const bool first = i == 0 || !follows(tiles[i], tiles[i - 1]);
    kernel.backward_tile(p, tiles[i], plan, workspace, first ? nullptr : &done[i - 1], &done[i]);
  });
}

Tensor zeros_of(const std::vector<int64_t>& shape) {
  Tensor zeros = fresh(shape, ScalarType::Float);
  float* data = static_cast<float*>(zeros.data_ptr());
  torch::stable::parallel_for(0, zeros.numel(), kZeroGrain, [&](int64_t begin, int64_t end) {
    std::fill(data + begin, data + end, 0.0f);
  });
  return zeros;
}

std::vector<int64_t> shape(const Tensor& x) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < x.dim(); ++i) sizes.push_back(x.size(i));
  return sizes;
}

std::tuple<Tensor, Tensor> forward(Tensors q, Tensors k, Tensor v, OptionalTensor row_scale,
                                   OptionalTensor cu_seqlens, std::vector<int64_t> starts,
                                   int64_t granularity, double softmax_scale, Tensors q_turns,
                                   Tensors k_turns, bool interleaved) {
  AttentionParams p = make_params(
      q, k, v,
      {row_scale, cu_seqlens, starts, granularity, softmax_scale, q_turns, k_turns, interleaved});
  const bool packed = cu_seqlens.has_value();
  const Tensor out = fresh(shape(q[0]), q[0].scalar_type());
  const Tensor lse = packed ? new_empty(q[0], {p.heads_q, p.seqlen_q}, ScalarType::Float)
                            : new_empty(q[0], {p.batch, p.heads_q, p.seqlen_q}, ScalarType::Float);
  p.out = view(out, packed, "out");
  p.lse = static_cast<float*>(lse.data_ptr());
  run_forward(p);
  return {out, lse};
}

std::tuple<Tensors, Tensors, Tensor> backward(Tensor dout, OptionalTensor dlse, Tensors q,
                                              Tensors k, Tensor v, Tensor out, Tensor lse,
                                              OptionalTensor row_scale, OptionalTensor cu_seqlens,
                                              std::vector<int64_t> starts, int64_t granularity,
                                              double softmax_scale, Tensors q_turns,
                                              Tensors k_turns, bool interleaved) {
  AttentionParams p = make_params(
      q, k, v,
      {row_scale, cu_seqlens, starts, granularity, softmax_scale, q_turns, k_turns, interleaved});
  require(p.dtype == DType::f32 || q_turns.empty(), "the backward turns q in float32 only");
  const bool packed = cu_seqlens.has_value();
  check_like(dout, q[0], "dout", "q");
  check_like(out, q[0], "out", "q");
  p.dout = view(dout, packed, "dout");
  p.out = view(out, packed, "out");
  p.lse = check_lse(p, lse, "lse");
  if (dlse.has_value()) p.dlse = check_lse(p, *dlse, "dlse");
  Tensors dq, dk;
  for (int64_t r = 0; r < p.regions; ++r) {
    if (r == 0 || q_turns.empty()) {
      dq.push_back(fresh(shape(q[0]), ScalarType::Float));
      dk.push_back(zeros_of(shape(k[0])));
    }
    p.dq[r] = view(dq.back(), packed, "dq");
    p.dk[r] = view(dk.back(), packed, "dk");
  }
  const Tensor dv = zeros_of(shape(v));
  p.dv = view(dv, packed, "dv");
  run_backward(p);
  return {dq, dk, p.dtype == DType::f32 ? dv : torch::stable::to(dv, v.scalar_type())};
}

}  // namespace
}  // namespace attention

STABLE_TORCH_LIBRARY_IMPL(extrope, CPU, m) {
  m.impl("region_attn_fwd", TORCH_BOX(&attention::forward));
  m.impl("region_attn_bwd", TORCH_BOX(&attention::backward));
}

}  // namespace extrope
