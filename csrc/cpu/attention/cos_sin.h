// Cosines and sines of every token, and keys rotated by them: one function per instruction set of
// cos_sin_kernel.cpp.
#pragma once

#include "cpu/attention/params.h"

namespace extrope {

// A table with a row for every token of every sequence, in each of `heads` heads of k: cosines,
// then as many sines.
struct CosSinTable {
  const double* inv_freq;   // rows of `half` frequencies, each padded to `padded`
  const double* log_decay;  // padded too, or nullptr; has the sign for keys or queries
  int64_t half, padded;
  int64_t freq_row;   // stride of sequences; 0 if all share frequencies
  int64_t freq_head;  // stride of heads, likewise
  int64_t heads = 1;  // 1: all heads share rows
  double amplitude;

  PositionMap map;
  PairMaps pair_maps;
  PositionMap from;           // the rotation that rows already have
  Starts start;               // positions of the sequences' first tokens
  const int32_t* cu_seqlens;  // nullptr: not packed, or all positions are the same
  int64_t num_sequences;

  float* out;
  int64_t tokens;      // per batch row; 1 if all positions are the same
  int64_t begin, end;  // the tokens to fill

  bool is_of_pairs() const { return map.is_of_pairs() || from.is_of_pairs(); }
  int64_t stride() const { return heads * 2 * padded; }
  CosSin rows(int64_t batch) const {
    return {out, out + padded, batch > 1 ? tokens * stride() : 0, tokens > 1 ? stride() : 0,
            heads > 1 ? 2 * padded : 0};
  }
};

// Fills rows begin..end-1 of (batch, tokens).
using FillCosSin = void (*)(const CosSinTable&, int64_t begin, int64_t end);
// Rotates the tokens begin..end-1 of (batch, seqlen_k) in all heads of k, into `out`.
using RotateKeys = void (*)(const AttentionParams&, const AttentionTensor& k, const CosSin&,
                            const AttentionTensor& out, int64_t begin, int64_t end);

#define EXTROPE_DECLARE(isa)                                                              \
  void fill_cos_sin_##isa(const CosSinTable&, int64_t begin, int64_t end);                \
  void rotate_keys_##isa(const AttentionParams&, const AttentionTensor& k, const CosSin&, \
                         const AttentionTensor& out, int64_t begin, int64_t end);

EXTROPE_DECLARE(baseline)
EXTROPE_DECLARE(avx2)
EXTROPE_DECLARE(avx512)
EXTROPE_DECLARE(neon)

#undef EXTROPE_DECLARE

}  // namespace extrope
