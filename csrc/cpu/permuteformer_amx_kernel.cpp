// Decayed linear attention in bf16, on processors with AMX: the forward's sweep, whose scores have
// the feature map and no extra term.
//
// As permuteformer_kernel.cpp, with every product in tiles. Scores are rounded to bf16, and so is
// what is added to a state; the state is not: products take it as two terms.

#include "permuteformer.h"
#include "permuteformer_amx_state.h"

namespace extrope {
namespace {

// ----------------------------------------------------------------------------------------------
// Rows

// 32 rows of a chunk at work.
struct Block {
  int64_t first;
  float x_terms[kDepth];  // what eps adds to all scores of a row
  float factors[kDepth];  // of a row
};

inline floats column_of_sums(const TileScratch& s, int64_t row, int column) {
  const __m512i at =
      _mm512_set_epi32(240, 224, 208, 192, 176, 160, 144, 128, 112, 96, 80, 64, 48, 32, 16, 0);
  return bits_as<floats>(_mm512_i32gather_ps(at, s.row_sums + row * kSide + column, 4));
}

// row_sums = x times the columns of the sum.
void sum_rows(const TilePart& part, Block& block, float sum) {
  const TileScratch& s = part.s;
  const int64_t dim_tiles = part.n.dim_tiles;
  const bf16* x = s.x + block.first / kSide * dim_tiles * kTileValues;
  _tile_zero(0);
  _tile_zero(2);
  for (int64_t d = 0; d < dim_tiles; ++d) {
    _tile_loadd(6, s.columns + d * kTileValues, kRowBytes);
    _tile_loadd(4, x + d * kTileValues, kRowBytes);
    _tile_loadd(5, x + (dim_tiles + d) * kTileValues, kRowBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
  }
  _tile_stored(0, s.row_sums, kRowBytes);
  _tile_stored(2, s.row_sums + kTileSums, kRowBytes);
  for (int64_t i = 0; i < kDepth; i += kSide) {
    const floats x = column_of_sums(s, i, 2),
                 sums = column_of_sums(s, i, 0) + column_of_sums(s, i, 1);
    store(block.x_terms + i,
          (x + broadcast(kFeatureEps * part.p.score_dim)) * broadcast(kFeatureEps));
    store(s.den + block.first + i, sums + broadcast(kFeatureEps * sum));
  }
}

// Scores of the block and of those before it: decay^(i - j) <phi(x_i), phi(y_j)>, rounded.
void make_scores(const TilePart& part, const Block& block) {
  const TileScratch& s = part.s;
  const int64_t dim_tiles = part.n.dim_tiles;
  for (int64_t j = 0; j <= block.first; j += kDepth) {
    product_of_tiles(
        {s.x + block.first / kSide * dim_tiles * kTileValues, dim_tiles * kTileValues, kTileValues,
         s.y_lanes + j / kSide * kTileValues, 2 * kTokenTiles * kTileValues, dim_tiles},
        {s.here, kSide * kDepth, kSide, kDepth});
    const floats y[2] = {load<floats>(s.y_sums + j) * broadcast(kFeatureEps),
                         load<floats>(s.y_sums + j + kSide) * broadcast(kFeatureEps)};
    bf16* to = s.scores + (block.first / kSide * kTokenTiles + j / kDepth) * kTileValues;
    for (int64_t i = 0; i < kDepth; ++i) {
      const float* powers = s.falling + (kChunk - 1 - block.first - i) + j;
      floats scores[2];
      part.ahead.fetch(kLinesOfRow);
      for (int half = 0; half < 2; ++half) {
        scores[half] = load<floats>(s.here + i * kDepth + half * kSide) + y[half] +
                       broadcast(block.x_terms[i]);
        scores[half] *= load<floats>(powers + half * kSide);
      }
      store(to + (i / kSide * kTokenTiles * kSide + i % kSide) * kDepth,
            pair_values(scores[0], scores[1]));
    }
  }
}

// Adds the block's scores to what is in den, as they were rounded: so their errors cancel.
void sum_scores(const TilePart& part, const Block& block) {
  const TileScratch& s = part.s;
  const bf16* scores = s.scores + block.first / kSide * kTokenTiles * kTileValues;
  _tile_zero(0);
  _tile_zero(2);
  _tile_loadd(6, s.ones, kRowBytes);
  for (int64_t j = 0; j <= block.first / kDepth; ++j) {
    _tile_loadd(4, scores + j * kTileValues, kRowBytes);
    _tile_loadd(5, scores + (kTokenTiles + j) * kTileValues, kRowBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
  }
  _tile_stored(0, s.row_sums, kRowBytes);
  _tile_stored(2, s.row_sums + kTileSums, kRowBytes);
  for (int64_t i = block.first; i < block.first + kDepth; i += kSide) {
    const floats before = load<floats>(s.den + i) * load<floats>(s.rising + i + 1);
    store(s.den + i, before + column_of_sums(s, i - block.first, 0));
  }
}

// 32 columns of the block's rows, from the state and from the chunk.
void make_columns(const TilePart& part, const Block& block, int64_t f) {
  const TileScratch& s = part.s;
  const TileSizes& n = part.n;
  Factors factors{s.x + block.first / kSide * n.dim_tiles * kTileValues,
                  n.dim_tiles * kTileValues,
                  kTileValues,
                  s.state + f * kTileValues,
                  n.wide_tiles * kTileValues,
                  n.dim_tiles};
  // The same row sixteen times.
  _tile_loadd(0, s.state_sums + f * kSide, 0);
  _tile_loadd(1, s.state_sums + (f + 1) * kSide, 0);
  _tile_loadd(2, s.state_sums + f * kSide, 0);
  _tile_loadd(3, s.state_sums + (f + 1) * kSide, 0);
  multiply_tiles(factors);
  factors.b = s.rest + f * kTileValues;
  multiply_tiles(factors);
  _tile_stored(0, s.before, kDepth * 4);
  _tile_stored(1, s.before + kSide, kDepth * 4);
  _tile_stored(2, s.before + kSide * kDepth, kDepth * 4);
  _tile_stored(3, s.before + kSide * kDepth + kSide, kDepth * 4);
  if (!part.p.causal) return;
  product_of_tiles(
      {s.scores + block.first / kSide * kTokenTiles * kTileValues, kTokenTiles * kTileValues,
       kTileValues, s.w + f * kTileValues, n.wide_tiles * kTileValues, block.first / kDepth + 1},
      {s.here, kSide * kDepth, kSide, kDepth});
}

template <typename Out>
void store_columns(Out* to, int64_t count, floats even, floats odd) {
  if constexpr (sizeof(Out) == 2) {
    const __mmask32 there = count >= kDepth ? ~0u : (1u << count) - 1;
    _mm512_mask_storeu_epi16(to, there, bits_as<__m512i>(pair_values(even, odd)));
  } else {
    float row[kDepth];
    store_pairs(row, even, odd);
    std::memcpy(to, row, smaller(count, kDepth) * sizeof(float));
  }
}

template <typename Out>
void finish_columns(const TilePart& part, const Chunk& chunk, const Block& block, int64_t head,
                    int64_t f) {
  const SweepParams& p = part.p;
  const TileScratch& s = part.s;
  const Walk<Out> out = part.walk<Out>(p.out, head, chunk.first + block.first);
  for (int64_t i = 0; i < smaller(kDepth, chunk.count - block.first); ++i) {
    const int64_t row = block.first + i;
    floats sums[2];
    part.ahead.fetch(kLinesOfRow);
    for (int half = 0; half < 2; ++half) {
      const int64_t at = i * kDepth + half * kSide;
      sums[half] = load<floats>(s.before + at);
      if (p.causal)
        sums[half] = sums[half] * broadcast(s.rising[row + 1]) + load<floats>(s.here + at);
      sums[half] *= broadcast(block.factors[i]);
    }
    store_columns(out[i] + f * kSide, p.value_dim - f * kSide, sums[0], sums[1]);
  }
}

void find_factors(const TilePart& part, const Chunk& chunk, Block& block, int64_t head) {
  const SweepParams& p = part.p;
  const float* den = part.s.den + block.first;
  for (int64_t i = 0; i < kDepth; i += kSide) {
    const floats one = broadcast(1.0f);
    store(block.factors + i, p.den ? one / load<floats>(den + i) : one);
  }
  for (int64_t i = 0; p.den && i < smaller(kDepth, chunk.count - block.first); ++i) {
    *part.number({p.den, p.x.heads}, head, chunk.first + block.first + i) = den[i];
  }
}

// ----------------------------------------------------------------------------------------------
// Chunks

void pack_keys(const TilePart& part, const Chunk& chunk) {
  pack_rows(part, chunk, part.p.y, 0, part.s.y);
  pack_columns(part, chunk);
  pack_values(part, chunk);
}

void sweep_chunk(const TilePart& part, const Chunk& chunk) {
  const SweepParams& p = part.p;
  if (p.permute) take_powers<bf16>(part, chunk);
  if (p.causal) pack_keys(part, chunk);
  prepare_state(part, chunk);
  const float sum = prepare_sum(part);
  for (int64_t head = 0; head < heads_of_state(p, p.x.heads); ++head) {
    pack_rows(part, chunk, p.x, head, part.s.x);
    for (Block block{}; block.first < chunk.rows; block.first += kDepth) {
      sum_rows(part, block, sum);
      if (p.causal) make_scores(part, block);
      if (p.causal && p.den) sum_scores(part, block);
      find_factors(part, chunk, block, head);
      for (int64_t f = 0; f < part.n.wide_tiles; f += 2) {
        make_columns(part, block, f);
        p.out_is_float ? finish_columns<float>(part, chunk, block, head, f)
                       : finish_columns<bf16>(part, chunk, block, head, f);
      }
    }
  }
  if (!p.causal) return;
  add_to_state(part, chunk);
  add_to_sum(part, chunk);
}

// Tiles whose values do not change, and what lies behind the lanes.
void clear_tiles(const TilePart& part) {
  const TileScratch& s = part.s;
  const TileSizes& n = part.n;
  if (part.p.score_dim < n.dim) {
    std::memset(s.state, 0, n.dim * n.wide * sizeof(bf16));
    std::memset(s.rest, 0, n.dim * n.wide * sizeof(bf16));
    std::memset(s.columns, 0, n.dim * kSide * sizeof(bf16));
  }
  std::memset(s.w_sums, 0, n.wide * sizeof(float));
  for (int64_t d = 0; d < part.p.score_dim; ++d) {
    s.columns[d / 2 * kDepth + d % 2 + 4] = {0x3f80};
  }
  for (int64_t i = 0; i < kTileValues; i += kDepth) store(s.ones + i, words{} + 0x3f803f80);
}

}  // namespace

SweepPlan sweep_plan_amx(const SweepParams& p) {
  const TileSizes n(p);
  return {kChunk, n.rows * n.row_step + n.dim, TileScratch(n, nullptr).space.used()};
}

void sweep_gather_amx(const SweepParams& p, const SweepPart& part, const SweepNext& next,
                      float* workspace, float* state) {
  const ProductUnit unit;
  Ahead ahead(p, next, false, false);
  const TilePart whole(p, part, ahead, workspace, state);
  const Chunk chunk(part);
  clear_tiles(whole);
  if (p.permute) take_powers<bf16>(whole, chunk);
  pack_keys(whole, chunk);
  prepare_state(whole, chunk);
  add_to_state(whole, chunk);
  add_to_sum(whole, chunk);
}

void sweep_part_amx(const SweepParams& p, const SweepPart& part, const SweepNext& next,
                    float* workspace, float* state) {
  const ProductUnit unit;
  Ahead ahead(p, next, true, true);
  const TilePart whole(p, part, ahead, workspace, state);
  clear_tiles(whole);
  sweep_chunk(whole, Chunk(part));
}

void sweep_load_amx(const SweepParams& p, const SweepPart& part, float* state) {
  convert_state<TileSizes, true>(p, part, state);
}

void sweep_save_amx(const SweepParams& p, const SweepPart& part, float* state) {
  convert_state<TileSizes, false>(p, part, state);
}

}  // namespace extrope
