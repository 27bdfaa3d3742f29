// Registers the CPU kernels of the attention over regions and splits their work over torch's
// threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <thread>
#include <tuple>

#include "cpu/attention/kernels.h"
#include "cpu/attention/rotation.h"
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
    tile.first_q = tile.first_k = p.cu_seqlens ? p.cu_seqlens[s] : 0;
    for (tile.head = 0; tile.head < p.heads_k; ++tile.head) {
      for (tile.token = 0; tile.token < tile.seqlen_q; tile.token += rows) {
        tile.tokens = std::min(rows, tile.seqlen_q - tile.token);
        tiles.push_back(tile);
      }
    }
  }
  return tiles;
}

// Runs work(index, workspace) for every index below `count`, started in that order.
template <typename Work>
void run(const AttentionParams& p, int64_t count, int64_t workspace, const Work& work) {
  const int64_t products = p.batch * p.heads_q * p.seqlen_q * p.seqlen_k * p.head_dim;
  DynamicThreads(num_threads(count, products), workspace).run(count, work);
}

void run_forward(const AttentionParams& p) {
  const Kernels kernel = kernels(p.dtype);
  const TilePlan plan = kernel.plan(p);
  std::vector<QueryTile> tiles = cut(p, plan.tokens);
  if (tiles.empty()) return;
  // Late rows see most keys: the longest tiles come first within a head, so that none is left over
  // for one thread at the end.
  std::reverse(tiles.begin(), tiles.end());
  run(p, static_cast<int64_t>(tiles.size()), plan.workspace,
      [&](int64_t i, float* workspace) { kernel.tile(p, tiles[i], plan, workspace); });
}

bool follows(const QueryTile& tile, const QueryTile& previous) {
  return tile.batch == previous.batch && tile.first_q == previous.first_q &&
         tile.head == previous.head && tile.token > previous.token;
}

// In which order tiles start: those of as many heads as there are threads side by side, so that
// threads seldom wait for each other's sums, nor fetch them from each other's caches.
std::vector<int64_t> by_heads(const std::vector<QueryTile>& tiles) {
  std::vector<int64_t> order(tiles.size()), chain(tiles.size());
  for (size_t i = 0; i < tiles.size(); ++i) {
    order[i] = static_cast<int64_t>(i);
    if (i > 0) chain[i] = chain[i - 1] + !follows(tiles[i], tiles[i - 1]);
  }
  const int64_t threads = torch::stable::get_num_threads();
  const auto rank = [&](int64_t i) { return std::pair(chain[i] / threads, tiles[i].token); };
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return rank(a) < rank(b); });
  return order;
}

void run_backward(const AttentionParams& p) {
  const Kernels kernel = kernels(p.dtype);
  const TilePlan plan = kernel.backward_plan(p);
  const std::vector<QueryTile> tiles = cut(p, plan.tokens);
  if (tiles.empty()) return;
  const std::unique_ptr<KeysDone[]> done(new KeysDone[tiles.size()]());
  const std::vector<int64_t> order = by_heads(tiles);
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

std::tuple<Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, Tensor inv_freq,
                                   OptionalTensor cu_seqlens, OptionalTensor log_decay,
                                   std::vector<int64_t> starts, int64_t granularity,
                                   std::vector<double> maps, std::optional<double> softmax_scale,
                                   std::optional<double> log_n, double attention_factor,
                                   bool interleaved) {
  const Options options{inv_freq, cu_seqlens,    log_decay, starts,           granularity,
                        maps,     softmax_scale, log_n,     attention_factor, interleaved};
  AttentionParams p = make_params(q, k, v, options);
  // Every row of q is read once. Those of k are read by many tiles: in 16 bits, where products are
  // fast and rotated keys small, they are rotated beforehand.
  const Rotation rotation(p, options, /*keys_ahead=*/p.dtype != DType::f32);
  const bool packed = cu_seqlens.has_value();
  const Tensor out = fresh(shape(q), q.scalar_type());
  const Tensor lse = packed ? new_empty(q, {p.heads_q, p.seqlen_q}, ScalarType::Float)
                            : new_empty(q, {p.batch, p.heads_q, p.seqlen_q}, ScalarType::Float);
  p.out = view(out, packed, "out");
  p.lse = static_cast<float*>(lse.data_ptr());
  run_forward(p);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor dout, OptionalTensor dlse, Tensor q, Tensor k,
                                            Tensor v, Tensor out, Tensor lse, Tensor inv_freq,
                                            OptionalTensor cu_seqlens, OptionalTensor log_decay,
                                            std::vector<int64_t> starts, int64_t granularity,
                                            std::vector<double> maps,
                                            std::optional<double> softmax_scale,
                                            std::optional<double> log_n, double attention_factor,
                                            bool interleaved) {
  const Options options{inv_freq, cu_seqlens,    log_decay, starts,           granularity,
                        maps,     softmax_scale, log_n,     attention_factor, interleaved};
  AttentionParams p = make_params(q, k, v, options);
  const bool packed = cu_seqlens.has_value();
  check_like(dout, q, "dout", "q");
  check_like(out, q, "out", "q");
  p.dout = view(dout, packed, "dout");
  p.out = view(out, packed, "out");
  p.lse = check_lse(p, lse, "lse");
  if (dlse.has_value()) p.dlse = check_lse(p, *dlse, "dlse");
  const Rotation rotation(p, options, /*keys_ahead=*/false);
  const Tensor dq = fresh(shape(q), ScalarType::Float);
  const Tensor dk = zeros_of(shape(k)), dv = zeros_of(shape(v));
  p.dq = view(dq, packed, "dq");
  p.dk = view(dk, packed, "dk");
  p.dv = view(dv, packed, "dv");
  run_backward(p);
  if (p.dtype == DType::f32) return {dq, dk, dv};
  const auto narrow = [&](const Tensor& x) { return torch::stable::to(x, q.scalar_type()); };
  return {narrow(dq), narrow(dk), narrow(dv)};
}

}  // namespace
}  // namespace attention

STABLE_TORCH_LIBRARY_IMPL(extrope, CPU, m) {
  m.impl("attention_fwd", TORCH_BOX(&attention::forward));
  m.impl("attention_bwd", TORCH_BOX(&attention::backward));
}

}  // namespace extrope
