// Where new tokens are: their positions, and their slots in the cache.
#pragma once

#include <cmath>

#include "cuda/append/kernel.h"
#include "cuda/tokens.h"

namespace extrope {

// PositionMap, of a whole position.
__device__ inline double mapped(const PositionMap& map, double position) {
  if (map.modulus > 0) {
    const double modulus = static_cast<double>(map.modulus);
    position -= floor(position / modulus) * modulus;
  }
  position /= map.divisor;
  if (map.floor) position = floor(position);
  return fmin(position + map.offset, map.cap);
}

__device__ inline Token<double> place_token(const AppendParams& p, int index) {
  Token<double> token = find_token<double>(p.rope, index);
  if (p.behind && p.cache.leftpad != nullptr) token.position -= p.cache.leftpad[token.sequence];
  if (p.maps) token.position = mapped(p.map, token.position);
  return token;
}

struct CachePlace {
  int64_t block, slot;
  bool exists;
};

__device__ inline CachePlace slot_given(const AppendParams& p, const Token<double>& token) {
  const int64_t at = token.batch * p.slot_batch + token.seq * p.slot_seq;
  const int64_t slot = p.slots_are_i64 ? static_cast<const int64_t*>(p.slots)[at]
                                       : static_cast<const int32_t*>(p.slots)[at];
  if (slot < 0 || slot >= p.blocks * p.cache.page_size) return {0, 0, false};
  const int64_t block = slot / p.cache.page_size;
  return {block, slot - block * p.cache.page_size, true};
}

__device__ inline CachePlace slot_behind(const AppendParams& p, const Token<double>& token) {
  const KVCache& cache = p.cache;
  int64_t slot = token.seq;
  if (cache.cu_new != nullptr) {
    slot -= cache.cu_new[token.sequence];
    if (slot < 0 || token.seq >= cache.cu_new[token.sequence + 1]) return {0, 0, false};
  }
  slot += cache.seqlens[token.sequence];
  if (slot < 0 || slot >= cache.capacity) return {0, 0, false};
  if (cache.block_table == nullptr) return {token.sequence, slot, true};
  const int64_t page = slot / cache.page_size;
  const int64_t block = cache.block_table[token.sequence * cache.table_batch + page];
  return {block, slot - page * cache.page_size, block >= 0 && block < p.blocks};
}

}  // namespace extrope
