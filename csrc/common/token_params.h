// The dtype of a call, its tokens and their positions, in plain data.
#pragma once

#include <cstdint>

namespace extrope {

// Of all that rotates, either way: positions are float64, and past it tokens that follow each other
// share one.
constexpr int64_t kFarthestPosition = int64_t{1} << 53;

enum class DType : int32_t { f32, f64, bf16, f16 };
enum class PositionType : int32_t { i32, i64, f32, f64 };

struct TokenParams {
  int64_t batch, seqlen;  // packed sequences: batch 1, seqlen = all tokens

  // nullptr: the token's index in its sequence. Otherwise (batch or 1, seqlen) positions, or with
  // positions_are_offsets one offset per sequence (position_seq is then unused). `offset` is added
  // to all.
  const void* positions;
  PositionType position_type;
  bool positions_are_offsets;
  int64_t position_batch, position_seq;
  int64_t offset;

  const int32_t* cu_seqlens;  // (num_sequences + 1,) token boundaries, nullptr if not packed
  int64_t num_sequences;
};

}  // namespace extrope
