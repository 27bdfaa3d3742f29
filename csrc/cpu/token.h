// The tokens of a rotation: where their lanes are, whose frequencies they take, their positions.
#pragma once

#include <algorithm>

#include "../common/rope_params.h"

namespace extrope {
namespace {

inline double read_position(const RopeParams& p, int64_t index) {
  switch (p.position_type) {
    case PositionType::i32:
      return static_cast<const int32_t*>(p.positions)[index];
    case PositionType::i64:
      return static_cast<double>(static_cast<const int64_t*>(p.positions)[index]);
    case PositionType::f32:
      return static_cast<const float*>(p.positions)[index];
    default:
      return static_cast<const double*>(p.positions)[index];
  }
}

struct Token {
  int64_t batch, seq;
  int64_t sequence;  // the packed sequence, else the batch index
  double position;   // on the first axis
};

inline Token locate(const RopeParams& p, int64_t batch, int64_t seq) {
  Token token{batch, seq, batch, 0.0};
  int64_t index = seq;
  if (p.cu_seqlens) {
    const int32_t* end = p.cu_seqlens + p.num_sequences + 1;
    token.sequence =
        std::upper_bound(p.cu_seqlens, end, static_cast<int32_t>(seq)) - p.cu_seqlens - 1;
    index = seq - p.cu_seqlens[token.sequence];
  }
  if (!p.positions) {
    token.position = static_cast<double>(index);
  } else if (p.positions_are_offsets) {
    token.position =
        read_position(p, token.sequence * p.position_batch) + static_cast<double>(index);
  } else {
    token.position = read_position(p, batch * p.position_batch + seq * p.position_seq);
  }
  token.position += static_cast<double>(p.offset);
  return token;
}

inline double position_on(const RopeParams& p, const Token& token, int64_t axis) {
  const int64_t index =
      axis * p.position_axis + token.batch * p.position_batch + token.seq * p.position_seq;
  return read_position(p, index) + static_cast<double>(p.offset);
}

}  // namespace
}  // namespace extrope
