// The state of a sweep in tiles: what products take of it, and how a chunk adds to it.
#pragma once

#include "cpu/linear_attention/bf16.h"

namespace extrope {
namespace {

// Rounds the state for the products, sums its rows, and lets it fade by the chunk, whose own terms
// of eps it gets. Rows behind score_dim stay zero.
void prepare_state(const TilePart& part, const Chunk& chunk) {
  const TileScratch& s = part.s;
  const TileSizes& n = part.n;
  const floats fading = broadcast(s.rising[chunk.count]);
  for (int64_t f = 0; f < n.wide_tiles; ++f) {
    const floats added = load<floats>(s.w_sums + f * kSide);
    watch(s, added);
    floats sum{};
    for (int64_t d = 0; d < part.p.score_dim; d += 2) {
      float* at = part.state + d * n.row_step + f * kSide;
      const floats a = load<floats>(at), b = load<floats>(at + n.row_step);
      const int64_t tile = (d / kDepth * n.wide_tiles + f) * kTileValues + d % kDepth / 2 * kDepth;
      store(s.state + tile, pair_values(a, b));
      sum += a + b;
      store(at, a * fading + added);
      if (d + 1 < part.p.score_dim) store(at + n.row_step, b * fading + added);
    }
    watch(s, sum);
    store(s.state_sums + f * kSide, sum * broadcast(kFeatureEps));
  }
}

void add_to_state(const TilePart& part, const Chunk& chunk) {
  const TileScratch& s = part.s;
  const TileSizes& n = part.n;
  for (int64_t d = 0; d < n.dim_tiles; ++d) {
    for (int64_t f = 0; f < n.wide_tiles; f += 2) {
      part.ahead.fetch();
      add_product_of_tiles(
          {s.y_columns + 2 * d * kTokenTiles * kTileValues, kTokenTiles * kTileValues, kTileValues,
           s.faded_w + f * kTileValues, n.wide_tiles * kTileValues, chunk.rows / kDepth},
          {part.state + d * kDepth * n.row_step + f * kSide, kSide * n.row_step, kSide,
           n.row_step});
    }
  }
}

// The sum of y as a factor: it and what rounding leaves out of it. Returns what its lanes sum to.
float prepare_sum(const TilePart& part) {
  float sum = 0.0f;
  for (int64_t d = 0; d < part.p.score_dim; ++d) {
    bf16* rounded = part.s.sum + d;
    narrow(part.sum[d], rounded[0]);
    narrow(part.sum[d] - widen(rounded[0]), rounded[part.n.dim]);
    sum += part.sum[d];
  }
  return sum;
}

// The sum of y, decayed, goes on by the chunk.
inline void add_to_sum(const TilePart& part, const Chunk& chunk) {
  const TileScratch& s = part.s;
  float decays = 0.0f;
  for (int64_t i = 0; i < chunk.count; ++i) decays += s.rising[i];
  for (int64_t d = 0; d < part.n.dim_tiles; ++d) {
    floats even{}, odd{};
    for (int64_t i = 0; i < chunk.count; ++i) {
      const words both =
          load<words>(s.y + (i / kSide * part.n.dim_tiles + d) * kTileValues + i % kSide * kDepth);
      const floats fading = broadcast(s.rising[chunk.count - 1 - i]);
      even += bits_as<floats>(both << 16) * fading;
      odd += bits_as<floats>(both & 0xffff0000) * fading;
    }
    watch(s, even + odd);
    float pairs[kDepth];
    const auto [low, high] = zip(even, odd, std::make_integer_sequence<int, kFloats>{});
    store(pairs, low);
    store(pairs + kFloats, high);
    for (int64_t i = 0; i < smaller(kDepth, part.p.score_dim - d * kDepth); ++i) {
      float& sum = part.sum[d * kDepth + i];
      sum = sum * s.rising[chunk.count] + pairs[i] + kFeatureEps * decays;
    }
  }
}

}  // namespace
}  // namespace extrope
