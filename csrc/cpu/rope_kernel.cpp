// The rotation on the CPU. Compiled once for each instruction set, with EXTROPE_ISA as its name.
//
// Tokens go in small blocks: the cosines and sines of a block are computed once, stay in the
// first-level cache, and serve every head of q and k. Within a block the loop over heads is inside
// or outside the loop over tokens, whichever walks memory forward.

#include <algorithm>
#include <tuple>
#include <vector>

#include "rope.h"
#include "simd.h"
#include "sincos.h"

#define EXTROPE_JOIN(a, b) a##b
#define EXTROPE_EXPAND(a, b) EXTROPE_JOIN(a, b)

namespace extrope {
namespace {

constexpr int64_t kBlock = 16;  // tokens

template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
template <typename T>
using WideVector = std::conditional_t<std::is_same_v<T, double>, doubles, floats>;

template <typename T>
struct Row {
  const T* in;
  T* out;
  const T* saved;
};

// One row of one head: out = turned in; with Grad also angle_grad += saved x out.
template <typename T, bool Interleaved, bool Grad>
void rotate_row(Row<T> row, int64_t half, const Wide<T>* cos, const Wide<T>* sin,
                Wide<T>* angle_grad) {
  using V = WideVector<T>;
  constexpr int64_t lanes = Lanes<V>::count;
  const int64_t step = Interleaved ? 2 : 1, second = Interleaved ? 1 : half;
  int64_t i = 0;
  for (; i + lanes <= half; i += lanes) {
    V a, b, xa, xb;
    if constexpr (Interleaved) {
      std::tie(a, b) = load_pairs(row.in + 2 * i);
      if constexpr (Grad) std::tie(xa, xb) = load_pairs(row.saved + 2 * i);
    } else {
      a = load_wide(row.in + i), b = load_wide(row.in + half + i);
      if constexpr (Grad) xa = load_wide(row.saved + i), xb = load_wide(row.saved + half + i);
    }
    const V c = load<V>(cos + i), s = load<V>(sin + i);
    const V out_a = a * c - b * s, out_b = b * c + a * s;
    if constexpr (Grad) store(angle_grad + i, load<V>(angle_grad + i) + (xa * out_b - xb * out_a));
    if constexpr (Interleaved) {
      store_pairs(row.out + 2 * i, out_a, out_b);
    } else {
      store_narrow(row.out + i, out_a);
      store_narrow(row.out + half + i, out_b);
    }
  }
  for (; i < half; ++i) {
    const Wide<T> a = widen(row.in[step * i]), b = widen(row.in[step * i + second]);
    const Wide<T> out_a = a * cos[i] - b * sin[i], out_b = b * cos[i] + a * sin[i];
    if constexpr (Grad) {
      angle_grad[i] +=
          widen(row.saved[step * i]) * out_b - widen(row.saved[step * i + second]) * out_a;
    }
    narrow(out_a, row.out[step * i]);
    narrow(out_b, row.out[step * i + second]);
  }
}

// Tables of one block of tokens and the padded frequencies they are made from.
template <typename T>
struct Scratch {
  explicit Scratch(const RopeParams& p)
      : half(p.rotary_dim / 2), stride((half + kDoubles - 1) / kDoubles * kDoubles) {
    freq.resize(stride);
    decay.resize(p.log_decay ? stride : 0);
    cos.resize(kBlock * stride);
    sin.resize(kBlock * stride);
    if (p.log_decay) std::copy_n(p.log_decay, half, decay.begin());
  }
  int64_t half, stride;
  std::vector<double> freq;
  std::vector<float> decay;
  std::vector<Wide<T>> cos, sin;
};

double read_position(const RopeParams& p, int64_t index) {
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
  double position;
};

Token locate(const RopeParams& p, int64_t batch, int64_t seq) {
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

template <typename T>
void fill_block(const RopeParams& p, const RopeTensor& tensor, const Token* tokens, int64_t count,
                int64_t head, Scratch<T>& scratch) {
  int64_t loaded = -1;
  for (int64_t t = 0; t < count; ++t) {
    const int64_t row = tokens[t].sequence * p.freq_batch + head * p.freq_head;
    if (row != loaded) {
      if (p.inv_freq_is_f64) {
        std::copy_n(static_cast<const double*>(p.inv_freq) + row, scratch.half,
                    scratch.freq.begin());
      } else {
        std::copy_n(static_cast<const float*>(p.inv_freq) + row, scratch.half,
                    scratch.freq.begin());
      }
      loaded = row;
    }
    const Angles angles{tokens[t].position, p.amplitude, tensor.decay_sign * tokens[t].position,
                        p.log_decay ? scratch.decay.data() : nullptr, p.conjugate};
    fill_sincos(scratch.freq.data(), scratch.half, angles, &scratch.cos[t * scratch.stride],
                &scratch.sin[t * scratch.stride]);
  }
}

template <typename T, bool Interleaved>
void rotate_one(const RopeParams& p, const RopeTensor& tensor, const Token& token, int64_t head,
                const Wide<T>* cos, const Wide<T>* sin) {
  const T* in = static_cast<const T*>(tensor.in) + token.batch * tensor.in_batch +
                token.seq * tensor.in_seq + head * tensor.in_head;
  T* out = static_cast<T*>(tensor.out) + token.batch * tensor.out_batch +
           token.seq * tensor.out_seq + head * tensor.out_head;
  const int64_t half = p.rotary_dim / 2;
  if (p.angle_grad) {
    const T* saved = static_cast<const T*>(tensor.saved) + token.batch * tensor.saved_batch +
                     token.seq * tensor.saved_seq + head * tensor.saved_head;
    const int64_t row =
        (token.batch * p.seqlen + token.seq) * p.angle_heads + (p.angle_heads > 1 ? head : 0);
    rotate_row<T, Interleaved, true>({in, out, saved}, half, cos, sin,
                                     static_cast<Wide<T>*>(p.angle_grad) + row * half);
  } else {
    rotate_row<T, Interleaved, false>({in, out, nullptr}, half, cos, sin, nullptr);
  }
  if (in != out && p.head_dim > p.rotary_dim) {
    std::memcpy(out + p.rotary_dim, in + p.rotary_dim, (p.head_dim - p.rotary_dim) * sizeof(T));
  }
}

template <typename T, bool Interleaved>
void rotate_block(const RopeParams& p, const Token* tokens, int64_t count, Scratch<T>& scratch) {
  const auto one = [&](const RopeTensor& tensor, int64_t t, int64_t head) {
    rotate_one<T, Interleaved>(p, tensor, tokens[t], head, &scratch.cos[t * scratch.stride],
                               &scratch.sin[t * scratch.stride]);
  };
  for (int64_t n = 0; n < p.num_tensors; ++n) {
    const RopeTensor& tensor = p.tensors[n];
    if (p.angle_heads > 1) {
      for (int64_t head = 0; head < tensor.heads; ++head) {
        fill_block(p, tensor, tokens, count, head, scratch);
        for (int64_t t = 0; t < count; ++t) one(tensor, t, head);
      }
      continue;
    }
    if (n == 0 || p.log_decay) fill_block(p, tensor, tokens, count, 0, scratch);
    if (tensor.in_head < tensor.in_seq) {
      for (int64_t t = 0; t < count; ++t) {
        for (int64_t head = 0; head < tensor.heads; ++head) one(tensor, t, head);
      }
    } else {
      for (int64_t head = 0; head < tensor.heads; ++head) {
        for (int64_t t = 0; t < count; ++t) one(tensor, t, head);
      }
    }
  }
}

template <typename T, bool Interleaved>
void rotate_tokens(const RopeParams& p, int64_t begin, int64_t end) {
  Scratch<T> scratch(p);
  Token tokens[kBlock];
  if (p.angle_grad) {
    const int64_t row = p.angle_heads * p.rotary_dim / 2;
    std::fill_n(static_cast<Wide<T>*>(p.angle_grad) + begin * row, (end - begin) * row, Wide<T>{0});
  }
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t count = std::min(kBlock, end - first);
    for (int64_t t = 0; t < count; ++t) {
      tokens[t] = locate(p, (first + t) / p.seqlen, (first + t) % p.seqlen);
    }
    rotate_block<T, Interleaved>(p, tokens, count, scratch);
  }
}

template <typename T>
void rotate_layout(const RopeParams& p, int64_t begin, int64_t end) {
  p.interleaved ? rotate_tokens<T, true>(p, begin, end) : rotate_tokens<T, false>(p, begin, end);
}

}  // namespace

void EXTROPE_EXPAND(rope_tokens_, EXTROPE_ISA)(const RopeParams& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case DType::f32:
      return rotate_layout<float>(p, begin, end);
    case DType::f64:
      return rotate_layout<double>(p, begin, end);
    case DType::bf16:
      return rotate_layout<bf16>(p, begin, end);
    case DType::f16:
      return rotate_layout<f16>(p, begin, end);
  }
}

}  // namespace extrope
