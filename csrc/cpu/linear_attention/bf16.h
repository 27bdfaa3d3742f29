// Operands of a chunk of decayed linear attention in tiles of bf16.
//
// phi(x) = relu(x) + eps has more digits than bf16, relu(x) has not: tiles hold relu(x), and what
// eps adds to a product is added in float32 from sums over lanes.
#pragma once

#include "cpu/linear_attention/powers.h"
#include "cpu/simd/bf16_products.h"

namespace extrope {
namespace {

constexpr int64_t kTokenTiles = kChunk / kDepth;  // blocks of 32 tokens
static_assert(kChunk % kDepth == 0 && kDepth == 2 * kSide && kFloats == kSide);

struct TileSizes {
  explicit TileSizes(const SweepParams& p)
      : dim(round_up(p.score_dim, kDepth)),
        wide(round_up(p.value_dim, kDepth)),
        dim_tiles(dim / kDepth),
        wide_tiles(wide / kSide),
        rows(dim),
        row_step(step_of(wide)),
        permuted(p.permute ? p.score_dim : 0) {}
  // Where a column of a state lies: of 32, the even ones come first.
  static int64_t column(int64_t f) { return f / kDepth * kDepth + f % 2 * kSide + f % kDepth / 2; }
  int64_t dim, wide;       // of a packed row of x and y, and of w
  int64_t dim_tiles;       // of 32 lanes
  int64_t wide_tiles;      // of 16 columns
  int64_t rows, row_step;  // of a state, in floats
  int64_t permuted;        // lanes of a row of x and y that is permuted, else 0
};

struct TileScratch : ChunkScratch {
  TileScratch(const TileSizes& n, float* begin) : ChunkScratch(n.permuted, begin) {
    const auto tiles = [&](int64_t values) {
      return reinterpret_cast<bf16*>(space.take(values / 2));
    };
    x = tiles(kChunk * n.dim);
    y = tiles(kChunk * n.dim);
    y_lanes = tiles(kChunk * n.dim);
    y_columns = tiles(kChunk * n.dim);
    w = tiles(kChunk * n.wide);
    faded_w = tiles(kChunk * n.wide);
    scores = tiles(kChunk * kChunk);
    state = tiles(n.dim * n.wide);
    sum = tiles(2 * n.dim);
    y_sums = space.take(kChunk);
    w_sums = space.take(n.wide);
    state_sums = space.take(n.wide);
    before = space.take(kDepth * kDepth);
    here = space.take(kDepth * kDepth);
    x_sums = space.take(kDepth);
    factors = space.take(kDepth);
    rows = space.take(2 * kSide * kSide);
    finite = space.take(kFloats);
  }
  // Tiles; tokens of 32 are paired as 0 with 16, 1 with 17 and so on where they are a depth.
  bf16 *x, *y;           // (tokens / 16, dim / 32), left
  bf16* y_lanes;         // (dim / 32, tokens / 16), right: y transposed
  bf16* y_columns;       // (dim / 16, tokens / 32), left: y transposed
  bf16 *w, *faded_w;     // (tokens / 32, wide / 16), right
  bf16* scores;          // (tokens / 16, tokens / 32), left
  bf16* state;           // (dim / 32, wide / 16), right: the state, rounded
  bf16* sum;             // (2, dim): the sum of y rounded, and what that left out
  float* y_sums;         // (tokens,): of lanes
  float* w_sums;         // (wide,): of faded_w's rows, times eps
  float* state_sums;     // (wide,): of the state's rows, times eps
  float *before, *here;  // (32, 32): rows made of the state and of the chunk
  float* x_sums;         // (32,): of a block's lanes
  float* factors;        // (32,): of a block's rows
  float* rows;           // (2, 16, 16): to be summed
  float* finite;         // (kFloats,): 0, or NaN once a value was not finite
};

using TilePart = PartOf<TileSizes, TileScratch>;

// ----------------------------------------------------------------------------------------------
// Packing

inline words relu(words x) {
  const __m512i v = bits_as<__m512i>(x), sign = _mm512_set1_epi16(int16_t(0x8000));
  // Of the negative ones only NaNs stay.
  const __mmask32 keep =
      _mm512_cmpgt_epu16_mask(_mm512_sub_epi16(v, sign), _mm512_set1_epi16(0x7f80));
  return bits_as<words>(_mm512_maskz_mov_epi16(keep, v));
}

// sums + both products of each pair.
inline floats add_products(floats sums, words a, words b) {
  return bits_as<floats>(
      _mm512_dpbf16_ps(bits_as<__m512>(sums), bits_as<__m512bh>(a), bits_as<__m512bh>(b)));
}

// sums + both values of each pair.
inline floats add_pairs(floats sums, words pairs) {
  return add_products(sums, pairs, words{} + 0x3f803f80);
}

// What each of 16 rows of 16 floats sums to.
inline floats total_of_rows(const float* from) {
  words rows[kSide];
  for (int64_t i = 0; i < kSide; ++i) rows[i] = load<words>(from + i * kSide);
  transpose(rows);
  floats sums{};
  for (int64_t i = 0; i < kSide; ++i) sums += bits_as<floats>(rows[i]);
  return sums;
}

// Keeps in mind whether a value is not finite.
inline void watch(const TileScratch& s, floats v) {
  store(s.finite, load<floats>(s.finite) + (v - v));
}

// The low halves of a beside those of b, and the high halves.
inline words low_pairs(words a, words b) { return (a & 0xffff) | b << 16; }
inline words high_pairs(words a, words b) { return a >> 16 | (b & 0xffff0000); }

// Rows of whole registers, permuted.
template <int Vectors>
void pack_registers(const TilePart& part, const Chunk& chunk, Walk<const bf16> rows, bf16* to) {
  using V = Vector<uint16_t>;
  const uint16_t* lanes = static_cast<const uint16_t*>(part.s.powers);
  for (int64_t i = 0; i < chunk.count; ++i, lanes += Vectors * kDepth) {
    bf16* tiles = to + (i / kSide * Vectors * kSide + i % kSide) * kDepth;
    V row[Vectors];
    for (int v = 0; v < Vectors; ++v) row[v] = load<V>(rows[i] + v * kDepth);
    for (int v = 0; v < Vectors; ++v) {
      const V picked = pick(row, load<V>(lanes + v * kDepth));
      store(tiles + v * kTileValues, relu(bits_as<words>(picked)));
    }
  }
}

inline void pack_any(const TilePart& part, const Chunk& chunk, Walk<const bf16> rows, bf16* to) {
  const int64_t dim = part.p.score_dim;
  const auto gather = choose_gather<uint16_t>(dim);
  const uint16_t* lanes = static_cast<const uint16_t*>(part.s.powers);
  for (int64_t i = 0; i < chunk.count; ++i) {
    bf16* tiles = to + (i / kSide * part.n.dim_tiles * kSide + i % kSide) * kDepth;
    const bf16* row = rows[i];
    if (part.p.permute) {
      uint16_t* permuted = static_cast<uint16_t*>(part.s.permuted);
      gather(reinterpret_cast<const uint16_t*>(row), lanes + i * dim, permuted, dim);
      row = reinterpret_cast<const bf16*>(permuted);
    }
    for (int64_t d = 0; d < part.n.dim_tiles; ++d) {
      store(tiles + d * kTileValues, relu(load_values(row + d * kDepth, dim - d * kDepth)));
    }
  }
}

// relu of rows of x or y, permuted; zero behind the chunk's last.
inline void pack_rows(const TilePart& part, const Chunk& chunk, const SweepTensor& x, int64_t head,
                      bf16* to) {
  const Walk<const bf16> rows = part.walk<const bf16>(x, head, chunk.first);
  if (part.p.permute && part.p.score_dim == 2 * kDepth) {
    pack_registers<2>(part, chunk, rows, to);
  } else if (part.p.permute && part.p.score_dim == 4 * kDepth) {
    pack_registers<4>(part, chunk, rows, to);
  } else {
    pack_any(part, chunk, rows, to);
  }
  for (int64_t i = chunk.count; i < chunk.rows; ++i) {
    bf16* tiles = to + (i / kSide * part.n.dim_tiles * kSide + i % kSide) * kDepth;
    for (int64_t d = 0; d < part.n.dim_tiles; ++d) store(tiles + d * kTileValues, words{});
  }
}

// y transposed, for scores and for the state, and what each token's lanes sum to.
inline void pack_columns(const TilePart& part, const Chunk& chunk) {
  const TileScratch& s = part.s;
  const int64_t dim_tiles = part.n.dim_tiles;
  std::memset(s.y_sums, 0, kChunk * sizeof(float));
  for (int64_t block = 0; block < chunk.rows / kDepth; ++block) {
    for (int64_t d = 0; d < dim_tiles; ++d) {
      words columns[2][kSide];
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t tile = 2 * block + half;
        words(&x)[kSide] = columns[half];
        for (int64_t i = 0; i < kSide; ++i) {
          x[i] = load<words>(s.y + (tile * dim_tiles + d) * kTileValues + i * kDepth);
        }
        transpose(x);
        floats sum[2] = {load<floats>(s.y_sums + tile * kSide), floats{}};
        bf16* lanes = s.y_lanes + (d * 2 * kTokenTiles + tile) * kTileValues;
        for (int64_t i = 0; i < kSide; ++i) {
          store(lanes + i * kDepth, x[i]);
          sum[i % 2] = add_pairs(sum[i % 2], x[i]);
        }
        store(s.y_sums + tile * kSide, sum[0] + sum[1]);
      }
      for (int64_t i = 0; i < kSide; ++i) {
        bf16* to = s.y_columns + (2 * d + i / 8) * kTokenTiles * kTileValues + block * kTileValues +
                   i % 8 * 2 * kDepth;
        store(to, low_pairs(columns[0][i], columns[1][i]));
        store(to + kDepth, high_pairs(columns[0][i], columns[1][i]));
      }
    }
  }
}

// w as it is and, for the state, faded to the chunk's last token.
inline void pack_values(const TilePart& part, const Chunk& chunk) {
  const TileScratch& s = part.s;
  const SweepParams& p = part.p;
  const Walk<const bf16> from = part.walk<const bf16>(p.w, 0, chunk.first);
  std::memset(s.w_sums, 0, part.n.wide * sizeof(float));
  for (int64_t token = 0; token < chunk.rows;
       token += token % kDepth == kSide - 1 ? kSide + 1 : 1) {
    const bool there[2] = {token < chunk.count, token + kSide < chunk.count};
    floats fading[2];
    const bf16* rows[2];
    for (int64_t i = 0; i < 2; ++i) {
      const int64_t at = smaller(token + i * kSide, chunk.count - 1);
      fading[i] = broadcast(s.rising[chunk.count - 1 - at]);
      rows[i] = from[at];
    }
    for (int64_t f = 0; f < part.n.wide_tiles; f += 2) {
      const int64_t left = p.value_dim - f * kSide;
      const words a = there[0] ? load_values(rows[0] + f * kSide, left) : words{};
      const words b = there[1] ? load_values(rows[1] + f * kSide, left) : words{};
      const words pairs[2] = {low_pairs(a, b), high_pairs(a, b)};
      const int64_t at =
          (token / kDepth * part.n.wide_tiles + f) * kTileValues + token % kSide * kDepth;
      for (int64_t i = 0; i < 2; ++i) {
        store(s.w + at + i * kTileValues, pairs[i]);
        const floats faded[2] = {bits_as<floats>(pairs[i] << 16) * fading[0],
                                 bits_as<floats>(pairs[i] & 0xffff0000) * fading[1]};
        float* sums = s.w_sums + (f + i) * kSide;
        store(sums, load<floats>(sums) + (faded[0] + faded[1]) * broadcast(kFeatureEps));
        store(s.faded_w + at + i * kTileValues, pair_values(faded[0], faded[1]));
      }
    }
  }
}

// ----------------------------------------------------------------------------------------------
// Before and after a chunk

// Zeros behind the lanes, and sums over no keys.
inline void clear_tiles(const TilePart& part) {
  const TileScratch& s = part.s;
  const TileSizes& n = part.n;
  if (part.p.score_dim < n.dim) {
    std::memset(s.state, 0, n.dim * n.wide * sizeof(bf16));
    std::memset(s.sum, 0, 2 * n.dim * sizeof(bf16));
  }
  std::memset(s.w_sums, 0, n.wide * sizeof(float));
  std::memset(s.finite, 0, kFloats * sizeof(float));
}

// A product in tiles leaves eps out: what is not finite, times 0 rather than eps, makes NaN of more
// than it should, and of tokens that do not see it. So the caller makes such a sweep anew.
inline void report(const TilePart& part) {
  const __m512 zeros = load<__m512>(part.s.finite);
  if (_mm512_cmp_ps_mask(zeros, zeros, _CMP_UNORD_Q) == 0) return;
  __atomic_store_n(part.p.not_finite, true, __ATOMIC_RELAXED);
}

}  // namespace
}  // namespace extrope
