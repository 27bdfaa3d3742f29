// Tokens: the places of their dims, their sequences, and their positions as a Number: double or,
// for exact integers that wrap around, uint64_t.
#pragma once

#include <algorithm>

#include "common/token_params.h"

namespace extrope {
namespace {

template <typename Number>
inline Number read_position(const TokenParams& p, int64_t index) {
  switch (p.position_type) {
    case PositionType::i32:
      return static_cast<Number>(static_cast<const int32_t*>(p.positions)[index]);
    case PositionType::i64:
      return static_cast<Number>(static_cast<const int64_t*>(p.positions)[index]);
    case PositionType::f32:
      return static_cast<Number>(static_cast<const float*>(p.positions)[index]);
    default:
      return static_cast<Number>(static_cast<const double*>(p.positions)[index]);
  }
}

template <typename Number>
struct Token {
  int64_t batch, seq;
  int64_t index;     // counted through batch and seq
  int64_t sequence;  // the packed sequence (the last one for tokens after it), else the batch index
  Number position;   // on the first axis
};

template <typename Number>
inline Token<Number> locate(const TokenParams& p, int64_t batch, int64_t seq) {
  Token<Number> token{batch, seq, batch * p.seqlen + seq, batch, 0};
  int64_t index = seq;
  if (p.cu_seqlens) {
    const int32_t* end = p.cu_seqlens + p.num_sequences;
    token.sequence =
        std::upper_bound(p.cu_seqlens, end, static_cast<int32_t>(seq)) - p.cu_seqlens - 1;
    index = seq - p.cu_seqlens[token.sequence];
  }
  if (!p.positions) {
    token.position = static_cast<Number>(index);
  } else if (p.positions_are_offsets) {
    token.position =
        read_position<Number>(p, token.sequence * p.position_batch) + static_cast<Number>(index);
  } else {
    token.position = read_position<Number>(p, batch * p.position_batch + seq * p.position_seq);
  }
  token.position += static_cast<Number>(p.offset);
  return token;
}

}  // namespace
}  // namespace extrope
