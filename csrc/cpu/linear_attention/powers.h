// Powers of permutations on the way into a chunk's operands: which lanes each token takes, and rows
// of x and y that are permuted, mapped and widened in one go.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cpu/linear_attention/tile.h"
#include "cpu/permute/lanes.h"
#include "cpu/runtime/token.h"

namespace extrope {
namespace {

template <typename T>
using WordOf = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;

inline floats feature(floats v) { return (v < floats{} ? floats{} : v) + kFeatureEps; }

template <bool Phi, typename T>
void pack_row(const T* from, int64_t dim, int64_t step, float* to) {
  int64_t d = 0;
  for (; d + kFloats <= dim; d += kFloats) {
    const floats v = load_wide(from + d);
    store(to + d, Phi ? feature(v) : v);
  }
  for (; d < dim; ++d) to[d] = Phi ? feature(floats{} + widen(from[d]))[0] : widen(from[d]);
  for (; d < step; ++d) to[d] = 0.0f;
}

// Packs one row: the lanes that it takes, room for a row of T, dim, and the packed row's length.
template <typename T>
using TakeRow = void (*)(const T*, const WordOf<T>*, void*, int64_t, int64_t, float*);

template <typename T>
void take_any_row(const T* from, const WordOf<T>* lanes, void* room, int64_t dim, int64_t step,
                  float* to) {
  using Word = WordOf<T>;
  Word* permuted = static_cast<Word*>(room);
  choose_gather<Word>(dim)(reinterpret_cast<const Word*>(from), lanes, permuted, dim);
  pack_row<true>(reinterpret_cast<const T*>(permuted), dim, step, to);
}

// Of `count` rows of lanes, fills in all but the first: each is one step more than that before it.
template <typename Word>
using StepLanes = void (*)(const Word* step, Word* lanes, int64_t count, int64_t dim);

template <typename Word>
void step_any_lanes(const Word* step, Word* lanes, int64_t count, int64_t dim) {
  const Gather<Word> gather = choose_gather<Word>(dim);
  for (int64_t i = 1; i < count; ++i, lanes += dim) gather(step, lanes, lanes + dim, dim);
}

#if defined(__AVX512F__)

// A row of whole registers needs no masks. The processor forwards no masked store to a load, so
// that what the next one reads at once would wait for the cache.
template <typename T, int Vectors>
void take_registers(const T* from, const WordOf<T>* lanes, void*, int64_t dim, int64_t step,
                    float* to) {
  using V = Vector<WordOf<T>>;
  constexpr int64_t n = kLanes<WordOf<T>>;
  V row[Vectors];
  for (int v = 0; v < Vectors; ++v) row[v] = load<V>(from + v * n);
  for (int v = 0; v < Vectors; ++v) {
    alignas(64) T picked[n];
    store(picked, pick(row, load<V>(lanes + v * n)));
    for (int64_t d = 0; d < n; d += kFloats) {
      store(to + v * n + d, feature(load_wide(picked + d)));
    }
  }
  for (int64_t d = dim; d < step; d += kFloats) store(to + d, floats{});
}

template <typename Word, int Vectors>
void step_registers(const Word* step, Word* lanes, int64_t count, int64_t dim) {
  using V = Vector<Word>;
  V row[Vectors], last[Vectors];
  for (int v = 0; v < Vectors; ++v) {
    row[v] = load<V>(step + v * kLanes<Word>);
    last[v] = load<V>(lanes + v * kLanes<Word>);
  }
  for (int64_t i = 1; i < count; ++i) {
    for (int v = 0; v < Vectors; ++v) {
      last[v] = pick(row, last[v]);
      store(lanes + i * dim + v * kLanes<Word>, last[v]);
    }
  }
}

template <typename T>
TakeRow<T> choose_taking(int64_t dim) {
  constexpr int64_t n = kLanes<WordOf<T>>;
  if (dim == 2 * n) return take_registers<T, 2>;
  if (dim == 4 * n) return take_registers<T, 4>;
  if (dim == 8 * n) return take_registers<T, 8>;
  return take_any_row<T>;
}

template <typename Word>
StepLanes<Word> choose_stepping(int64_t dim) {
  constexpr int64_t n = kLanes<Word>;
  if (dim == 2 * n) return step_registers<Word, 2>;
  if (dim == 4 * n) return step_registers<Word, 4>;
  if (dim == 8 * n) return step_registers<Word, 8>;
  return step_any_lanes<Word>;
}

#else

template <typename T>
TakeRow<T> choose_taking(int64_t) {
  return take_any_row<T>;
}

template <typename Word>
StepLanes<Word> choose_stepping(int64_t) {
  return step_any_lanes<Word>;
}

#endif

// The lanes that each of the chunk's tokens takes, from step to step while positions follow one
// another.
template <typename T>
void take_powers(const auto& part, const Chunk& chunk) {
  using Word = WordOf<T>;
  const SweepParams& p = part.p;
  const int64_t dim = p.score_dim, row = first_head(p, part.part, p.y.heads);
  Word *step = static_cast<Word*>(part.s.step), *lanes = static_cast<Word*>(part.s.powers);
  std::copy_n(p.cycles->step + row * dim, dim, step);
  const StepLanes<Word> step_on = choose_stepping<Word>(dim);
  const auto position = [&](int64_t i) {
    return locate<uint64_t>(*p.permute, part.part.batch, part.token(chunk.first + i)).position;
  };
  for (int64_t i = 0, end; i < chunk.count; i = end) {
    const uint64_t first = position(i);
    for (end = i + 1; end < chunk.count; ++end) {
      if (!follows(position(end), first + (end - 1 - i))) break;
    }
    power_lanes(*p.cycles, row, dim, static_cast<int64_t>(first), lanes + i * dim);
    step_on(step, lanes + i * dim, end - i, dim);
  }
}

}  // namespace
}  // namespace extrope
