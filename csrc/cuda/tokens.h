// Tokens: where their dims are, which sequence they belong to, their positions as a Number: double
// or, for exact integers that wrap around, uint64_t.
#pragma once

#include <cstdint>

#include "common/token_params.h"

namespace extrope {

template <typename Number>
struct Token {
  int batch, seq;   // where its dims are
  int sequence;     // the packed sequence, else the batch index
  Number position;  // on the first axis
};

template <typename Number>
__device__ inline Number load_position(const TokenParams& p, int64_t index) {
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

// The last sequence that starts at or before `token`; any contents of cu_seqlens give a sequence
// that exists.
__device__ inline int find_sequence(const TokenParams& p, int token) {
  int low = 0, high = static_cast<int>(p.num_sequences);
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    if (p.cu_seqlens[middle] <= token) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Token `index` of batch * seqlen, which the launcher keeps within an int: a 64-bit division would
// cost a call.
template <typename Number>
__device__ inline Token<Number> find_token(const TokenParams& p, int index) {
  Token<Number> token;
  token.batch = p.batch == 1 ? 0 : index / static_cast<int>(p.seqlen);
  token.seq = index - token.batch * static_cast<int>(p.seqlen);
  token.sequence = token.batch;
  int64_t place = token.seq;
  if (p.cu_seqlens != nullptr) {
    token.sequence = find_sequence(p, index);
    place -= p.cu_seqlens[token.sequence];
  }
  token.position = static_cast<Number>(p.offset);
  if (p.positions == nullptr) {
    token.position += static_cast<Number>(place);
  } else if (p.positions_are_offsets) {
    token.position +=
        static_cast<Number>(place) + load_position<Number>(p, token.sequence * p.position_batch);
  } else {
    token.position +=
        load_position<Number>(p, token.batch * p.position_batch + token.seq * p.position_seq);
  }
  return token;
}

}  // namespace extrope
