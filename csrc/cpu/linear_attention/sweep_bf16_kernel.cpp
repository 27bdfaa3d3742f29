// Decayed linear attention in bf16, on processors with AMX or AVX512_BF16: the forward's sweep,
// whose scores have the feature map and no extra term. Compiled once for each, with EXTROPE_ISA as
// its name.
//
// As permuteformer_kernel.cpp, with every product in tiles. Scores and the state are rounded to
// bf16 where a product takes them, and so is what is added to a state; the state itself is not.

#include "cpu/linear_attention/bf16_state.h"
#include "cpu/linear_attention/kernels.h"

namespace extrope {
namespace {

// ----------------------------------------------------------------------------------------------
// Blocks of 32 rows, from the chunk's row `first`

inline const bf16* tiles_of_x(const TilePart& part, int64_t first) {
  return part.s.x + first / kSide * part.n.dim_tiles * kTileValues;
}

// What the rows' lanes sum to, and den = x times the sum of y, whose lanes sum to `sum`.
void sum_rows(const TilePart& part, int64_t first, float sum) {
  const TileScratch& s = part.s;
  const TileSizes& n = part.n;
  for (int64_t i = 0; i < kDepth; i += kSide) {
    const bf16* x = tiles_of_x(part, first + i);
    for (int64_t r = 0; r < kSide; ++r) {
      floats sums{}, products{};
      for (int64_t d = 0; d < n.dim; d += kDepth) {
        const words row = load<words>(x + d * kSide + r * kDepth);
        sums = add_pairs(sums, row);
        products = add_products(products, row, load<words>(s.sum + d));
        products = add_products(products, row, load<words>(s.sum + n.dim + d));
      }
      store(s.rows + r * kSide, sums);
      store(s.rows + kTileSums + r * kSide, products);
    }
    const floats sums = total_of_rows(s.rows);
    watch(s, sums);
    store(s.x_sums + i, sums);
    store(s.den + first + i, total_of_rows(s.rows + kTileSums) + broadcast(kFeatureEps * sum));
  }
}

// Scores of the rows and of those before them: decay^(i - j) <phi(x_i), phi(y_j)>, rounded.
void make_scores(const TilePart& part, int64_t first) {
  const TileScratch& s = part.s;
  const int64_t dim_tiles = part.n.dim_tiles;
  const floats eps = broadcast(kFeatureEps);
  for (int64_t j = 0; j <= first; j += kDepth) {
    part.ahead.fetch();
    product_of_tiles(
        {tiles_of_x(part, first), dim_tiles * kTileValues, kTileValues,
         s.y_lanes + j / kSide * kTileValues, 2 * kTokenTiles * kTileValues, dim_tiles},
        {s.here, kSide * kDepth, kSide, kDepth});
    const floats y[2] = {load<floats>(s.y_sums + j) * eps,
                         load<floats>(s.y_sums + j + kSide) * eps};
    bf16* to = s.scores + (first / kSide * kTokenTiles + j / kDepth) * kTileValues;
    for (int64_t i = 0; i < kDepth; ++i) {
      const float* powers = s.falling + (kChunk - 1 - first - i) + j;
      const floats x = broadcast((s.x_sums[i] + kFeatureEps * part.p.score_dim) * kFeatureEps);
      floats scores[2];
      for (int half = 0; half < 2; ++half) {
        scores[half] = load<floats>(s.here + i * kDepth + half * kSide) + y[half] + x;
        scores[half] *= load<floats>(powers + half * kSide);
      }
      const words rounded = pair_values(scores[0], scores[1]);
      store(to + (i / kSide * kTokenTiles * kSide + i % kSide) * kDepth, rounded);
      float* sums = s.rows + i * kSide;
      store(sums, add_pairs(j > 0 ? load<floats>(sums) : floats{}, rounded));
    }
  }
}

// Adds the scores to what is in den, as they were rounded: so their errors cancel.
void sum_scores(const TilePart& part, int64_t first) {
  const TileScratch& s = part.s;
  for (int64_t i = 0; i < kDepth; i += kSide) {
    float* den = s.den + first + i;
    const floats before = load<floats>(den) * load<floats>(s.rising + first + i + 1);
    store(den, before + total_of_rows(s.rows + i * kSide));
  }
}

void find_factors(const TilePart& part, const Chunk& chunk, int64_t first, int64_t head) {
  const SweepParams& p = part.p;
  const float* den = part.s.den + first;
  for (int64_t i = 0; i < kDepth; i += kSide) {
    const floats one = broadcast(1.0f);
    store(part.s.factors + i, p.den ? one / load<floats>(den + i) : one);
  }
  for (int64_t i = 0; p.den && i < smaller(kDepth, chunk.count - first); ++i) {
    *part.number({p.den, p.x.heads}, head, chunk.first + first + i) = den[i];
  }
}

// 32 columns of the rows, from the state and from the chunk.
void make_columns(const TilePart& part, int64_t first, int64_t f) {
  const TileScratch& s = part.s;
  const TileSizes& n = part.n;
  part.ahead.fetch();
  product_of_tiles({tiles_of_x(part, first), n.dim_tiles * kTileValues, kTileValues,
                    s.state + f * kTileValues, n.wide_tiles * kTileValues, n.dim_tiles},
                   {s.before, kSide * kDepth, kSide, kDepth});
  if (!part.p.causal) return;
  part.ahead.fetch();
  product_of_tiles(
      {s.scores + first / kSide * kTokenTiles * kTileValues, kTokenTiles * kTileValues, kTileValues,
       s.w + f * kTileValues, n.wide_tiles * kTileValues, first / kDepth + 1},
      {s.here, kSide * kDepth, kSide, kDepth});
}

bool past_caches(const SweepParams& p) {
  return !p.out_is_float && leaves_past_caches(p, sizeof(bf16));
}

template <typename Out>
void store_columns(Out* to, int64_t count, floats even, floats odd, bool past_caches) {
  if constexpr (sizeof(Out) == 2) {
    const __m512i values = bits_as<__m512i>(pair_values(even, odd));
    if (past_caches) return _mm512_stream_si512(reinterpret_cast<__m512i*>(to), values);
    const __mmask32 there = count >= kDepth ? ~0u : (1u << count) - 1;
    _mm512_mask_storeu_epi16(to, there, values);
  } else {
    float row[kDepth];
    store_pairs(row, even, odd);
    std::memcpy(to, row, smaller(count, kDepth) * sizeof(float));
  }
}

template <typename Out>
void finish_columns(const TilePart& part, const Chunk& chunk, int64_t first, int64_t head,
                    int64_t f) {
  const SweepParams& p = part.p;
  const TileScratch& s = part.s;
  const Walk<Out> out = part.walk<Out>(p.out, head, chunk.first + first);
  const floats eps[2] = {load<floats>(s.state_sums + f * kSide),
                         load<floats>(s.state_sums + (f + 1) * kSide)};
  const bool past = past_caches(p);
  for (int64_t i = 0; i < smaller(kDepth, chunk.count - first); ++i) {
    floats sums[2];
    for (int half = 0; half < 2; ++half) {
      const int64_t at = i * kDepth + half * kSide;
      sums[half] = load<floats>(s.before + at) + eps[half];
      if (p.causal)
        sums[half] = sums[half] * broadcast(s.rising[first + i + 1]) + load<floats>(s.here + at);
      sums[half] *= broadcast(s.factors[i]);
    }
    store_columns(out[i] + f * kSide, p.value_dim - f * kSide, sums[0], sums[1], past);
  }
}

// ----------------------------------------------------------------------------------------------
// Chunks

void pack_keys(const TilePart& part, const Chunk& chunk) {
  pack_rows(part, chunk, part.p.y, 0, part.s.y);
  pack_columns(part, chunk);
  pack_values(part, chunk);
}

void make_rows(const TilePart& part, const Chunk& chunk) {
  const SweepParams& p = part.p;
  const float sum = prepare_sum(part);
  watch(part.s, broadcast(sum));
  for (int64_t head = 0; head < heads_of_state(p, p.x.heads); ++head) {
    pack_rows(part, chunk, p.x, head, part.s.x);
    for (int64_t first = 0; first < chunk.rows; first += kDepth) {
      sum_rows(part, first, sum);
      if (p.causal) make_scores(part, first);
      if (p.causal && p.den) sum_scores(part, first);
      find_factors(part, chunk, first, head);
      for (int64_t f = 0; f < part.n.wide_tiles; f += 2) {
        make_columns(part, first, f);
        p.out_is_float ? finish_columns<float>(part, chunk, first, head, f)
                       : finish_columns<bf16>(part, chunk, first, head, f);
      }
    }
  }
}

// How many products a chunk takes.
int64_t products(const TilePart& part, const Chunk& chunk, bool rows, bool keys) {
  const int64_t blocks = chunk.rows / kDepth, pairs = part.n.wide_tiles / 2;
  const int64_t of_head = (keys ? blocks * (blocks + 1) / 2 : 0) + (keys ? 2 : 1) * blocks * pairs;
  const int64_t heads = rows ? heads_of_state(part.p, part.p.x.heads) : 0;
  return heads * of_head + (keys ? part.n.dim_tiles * pairs : 0);
}

// A chunk: with its rows, without causality those alone.
void visit(const SweepParams& p, const SweepPart& part, const SweepNext& next, float* workspace,
           float* state, bool rows) {
  const ProductUnit unit;
  Ahead ahead(p, next, rows, !past_caches(p));
  const TilePart whole(p, part, ahead, workspace, state);
  const Chunk chunk(part);
  const bool keys = p.causal || !rows;
  ahead.deal(products(whole, chunk, rows, keys));
  clear_tiles(whole);
  if (p.permute) take_powers<bf16>(whole, chunk);
  if (keys) pack_keys(whole, chunk);
  prepare_state(whole, chunk);
  if (rows) make_rows(whole, chunk);
  if (keys) add_to_state(whole, chunk);
  if (keys) add_to_sum(whole, chunk);
  report(whole);
  if (rows && past_caches(p)) order_stores();
}

}  // namespace

SweepPlan EXTROPE_EXPAND(sweep_plan_, EXTROPE_ISA)(const SweepParams& p) {
  const TileSizes n(p);
  return {kChunk, n.rows * n.row_step + n.dim, TileScratch(n, nullptr).space.used()};
}

void EXTROPE_EXPAND(sweep_gather_, EXTROPE_ISA)(const SweepParams& p, const SweepPart& part,
                                                const SweepNext& next, float* workspace,
                                                float* state) {
  visit(p, part, next, workspace, state, false);
}

void EXTROPE_EXPAND(sweep_part_, EXTROPE_ISA)(const SweepParams& p, const SweepPart& part,
                                              const SweepNext& next, float* workspace,
                                              float* state) {
  visit(p, part, next, workspace, state, true);
}

void EXTROPE_EXPAND(sweep_load_, EXTROPE_ISA)(const SweepParams& p, const SweepPart& part,
                                              float* state) {
  convert_state<TileSizes, true>(p, part, state);
}

void EXTROPE_EXPAND(sweep_save_, EXTROPE_ISA)(const SweepParams& p, const SweepPart& part,
                                              float* state) {
  convert_state<TileSizes, false>(p, part, state);
}

}  // namespace extrope
