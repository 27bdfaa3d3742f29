// Cuts an attention into tiles and distributes them over torch's threads.
#pragma once

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "cpu/attention/kernels.h"
#include "cpu/runtime/capability.h"
#include "cpu/runtime/threads.h"

namespace extrope::attention {

struct AttentionKernels {
  PlanTiles plan, backward_plan;
  ForwardTile tile;
  BackwardTile backward_tile;
};

#define EXTROPE_KERNELS(isa)                                                   \
  AttentionKernels {                                                           \
    attention_plan_##isa, attention_backward_plan_##isa, attention_tile_##isa, \
        attention_backward_tile_##isa                                          \
  }

// Returns the fastest kernels for this processor.
inline AttentionKernels kernels(DType dtype) {
#if defined(EXTROPE_HAS_BF16)
  if (dtype == DType::bf16 && capability() >= kAvx512Bf16) {
    return EXTROPE_WIDEST_BF16(EXTROPE_KERNELS);
  }
#endif
  return EXTROPE_WIDEST(EXTROPE_KERNELS);
}

#undef EXTROPE_KERNELS

// Every row of q is read once, but rows of k are read by many tiles. In 16 bits products are fast
// and rotated keys small, so the forward has the keys rotated in advance.
inline bool rotates_ahead(DType dtype) { return dtype != DType::f32; }

// Returns all tiles; those of one sequence and one head of k are neighbours with rising rows.
inline std::vector<QueryTile> cut(const AttentionParams& p, int64_t rows) {
  std::vector<QueryTile> tiles;
  const int64_t sequences = p.cu_seqlens ? p.num_sequences : p.batch;
  for (int64_t s = 0; s < sequences; ++s) {
    QueryTile tile{};
    tile.batch = p.cu_seqlens ? 0 : s;
    tile.seqlen_q = p.cu_seqlens ? p.cu_seqlens[s + 1] - p.cu_seqlens[s] : p.seqlen_q;
    tile.seqlen_k = p.cu_seqlens ? tile.seqlen_q : p.seqlen_k;
    tile.first_q = tile.first_k = p.cu_seqlens ? p.cu_seqlens[s] : 0;
    tile.q_start = p.q_start.of(s), tile.k_start = p.k_start.of(s);
    for (tile.head = 0; tile.head < p.heads_k; ++tile.head) {
      for (tile.token = 0; tile.token < tile.seqlen_q; tile.token += rows) {
        tile.tokens = std::min(rows, tile.seqlen_q - tile.token);
        tiles.push_back(tile);
      }
    }
  }
  return tiles;
}

// Runs work(index, workspace) for every index below `count`, started in order.
template <typename Work>
void run(const AttentionParams& p, int64_t count, int64_t workspace, const Work& work) {
  const int64_t products = p.batch * p.heads_q * p.seqlen_q * p.seqlen_k * p.head_dim;
  DynamicThreads(num_threads(count, products), workspace).run(count, work);
}

// Late rows see most keys: within a head the longest tiles come first, so that no thread works on
// one alone at the end.
inline std::vector<QueryTile> forward_tiles(const AttentionParams& p, const TilePlan& plan) {
  std::vector<QueryTile> tiles = cut(p, plan.tokens);
  std::reverse(tiles.begin(), tiles.end());
  return tiles;
}

inline void run_forward(const AttentionParams& p, const AttentionKernels& kernel) {
  const TilePlan plan = kernel.plan(p);
  const std::vector<QueryTile> tiles = forward_tiles(p, plan);
  if (tiles.empty()) return;
  run(p, static_cast<int64_t>(tiles.size()), plan.workspace,
      [&](int64_t i, float* workspace) { kernel.tile(p, tiles[i], plan, workspace); });
}

inline bool follows(const QueryTile& tile, const QueryTile& previous) {
  return tile.batch == previous.batch && tile.first_q == previous.first_q &&
         tile.head == previous.head && tile.token > previous.token;
}

// Returns the order of tiles: as many heads as there are threads go in parallel, so that threads
// seldom wait for each other's sums, or fetch them from each other's caches.
inline std::vector<int64_t> by_heads(const std::vector<QueryTile>& tiles) {
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

inline void run_backward(const AttentionParams& p, const AttentionKernels& kernel) {
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

}  // namespace extrope::attention
