// The rotation on the CPU. Compiled once for each instruction set, with EXTROPE_ISA as its name.
//
// Tokens go in small blocks: the cosines and sines of a block are computed once, stay in the
// first-level cache, and serve every head of q and k. Within a block the loop over heads is inside
// or outside the loop over tokens, whichever goes through memory forward.

#include <algorithm>
#include <tuple>

#include "cpu/rope/kernel.h"
#include "cpu/runtime/scratch.h"
#include "cpu/runtime/token.h"
#include "cpu/simd/simd.h"
#include "cpu/simd/sincos.h"

namespace extrope {
namespace {

constexpr int64_t kBlock = 16;  // tokens
constexpr int64_t kBytesReadAhead = 2048, kBytesWrittenAhead = 1024;

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

// Half-split dims of 16 bits are read as 32-bit words of two neighbours, so that none has to
// move: a word gives one vector of even dims and one of odd dims, and cos and sin follow.
template <typename T, bool Interleaved>
constexpr bool kInWords = std::is_same_v<T, bf16> && !Interleaved;

// Rotates Vectors vectors of pairs from pair i on: two when they come in words.
template <typename T, bool Interleaved, bool Grad, int Vectors>
inline void rotate_vectors(Row<T> row, int64_t half, int64_t i, const Wide<T>* cos,
                           const Wide<T>* sin, Wide<T>* angle_grad) {
  using V = WideVector<T>;
  const auto load_dims = [&](const T* from, V* a, V* b) {
    if constexpr (Interleaved) {
      std::tie(a[0], b[0]) = load_pairs(from + 2 * i);
    } else if constexpr (Vectors == 2) {
      std::tie(a[0], a[1]) = load_pairs(from + i);
      std::tie(b[0], b[1]) = load_pairs(from + half + i);
    } else {
      a[0] = load_wide(from + i), b[0] = load_wide(from + half + i);
    }
  };
  V a[Vectors], b[Vectors], out_a[Vectors], out_b[Vectors];
  load_dims(row.in, a, b);
  for (int v = 0; v < Vectors; ++v) {
    const int64_t at = i + v * Lanes<V>::count;
    const V c = load<V>(cos + at), s = load<V>(sin + at);
    out_a[v] = a[v] * c - b[v] * s, out_b[v] = b[v] * c + a[v] * s;
  }
  if constexpr (Grad) {
    load_dims(row.saved, a, b);
    for (int v = 0; v < Vectors; ++v) a[v] = a[v] * out_b[v] - b[v] * out_a[v];
    if constexpr (Vectors == 2) {
      const auto [even, odd] = load_pairs(angle_grad + i);
      store_pairs(angle_grad + i, even + a[0], odd + a[1]);
    } else {
      store(angle_grad + i, load<V>(angle_grad + i) + a[0]);
    }
  }
  if constexpr (Interleaved) {
    store_pairs(row.out + 2 * i, out_a[0], out_b[0]);
  } else if constexpr (Vectors == 2) {
    store_pairs(row.out + i, out_a[0], out_a[1]);
    store_pairs(row.out + half + i, out_b[0], out_b[1]);
  } else {
    store_narrow(row.out + i, out_a[0]);
    store_narrow(row.out + half + i, out_b[0]);
  }
}

// One row of one head: out = rotated in; with Grad also angle_grad += saved x out.
template <typename T, bool Interleaved, bool Grad>
void rotate_row(Row<T> row, int64_t half, const Wide<T>* cos, const Wide<T>* sin,
                Wide<T>* angle_grad) {
  constexpr int64_t lanes = Lanes<WideVector<T>>::count;
  int64_t i = 0;
  if constexpr (kInWords<T, Interleaved>) {
    for (; i + 2 * lanes <= half; i += 2 * lanes) {
      rotate_vectors<T, Interleaved, Grad, 2>(row, half, i, cos, sin, angle_grad);
    }
  }
  for (; i + lanes <= half; i += lanes) {
    rotate_vectors<T, Interleaved, Grad, 1>(row, half, i, cos, sin, angle_grad);
  }
  const int64_t step = Interleaved ? 2 : 1, second = Interleaved ? 1 : half;
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

// Brings cos or sin of `half` pairs to the order in which rotate_row reads words.
inline void order_by_words(float* row, int64_t half) {
  for (int64_t i = 0; i + 2 * kFloats <= half; i += 2 * kFloats) {
    const auto [even, odd] = load_pairs(row + i);
    store(row + i, even), store(row + i + kFloats, odd);
  }
}

// Cosines and sines of one block of tokens, and the padded frequencies and decays that they are
// made from.
template <typename T>
struct Scratch {
  Scratch(const RopeParams& p, int64_t tokens)
      : half(p.rotary_dim / 2), stride((half + kDoubles - 1) / kDoubles * kDoubles) {
    freq.resize(stride);
    decay.resize(p.log_decay ? stride : 0);
    cos.resize(std::min(kBlock, tokens) * stride);
    sin.resize(std::min(kBlock, tokens) * stride);
    if (p.log_decay) std::copy_n(p.log_decay, half, decay.begin());
    if (!p.axes) return;
    positions.resize(p.num_axes);
    moved_freq.resize(stride);
    moved_decay.resize(decay.size());
  }
  int64_t half, stride;
  Buffer<double> freq, decay;
  Buffer<double> positions, moved_freq, moved_decay;  // of one token, by axis and by pair
  Buffer<Wide<T>> cos, sin;
};

template <typename T>
void load_freq(const RopeParams& p, int64_t row, Scratch<T>& scratch) {
  if (p.inv_freq_is_f64) {
    std::copy_n(static_cast<const double*>(p.inv_freq) + row, scratch.half, scratch.freq.begin());
  } else {
    std::copy_n(static_cast<const float*>(p.inv_freq) + row, scratch.half, scratch.freq.begin());
  }
}

inline double position_on(const RopeParams& p, const Token<double>& token, int64_t axis) {
  const int64_t index =
      axis * p.position_axis + token.batch * p.position_batch + token.seq * p.position_seq;
  return read_position<double>(p, index) + static_cast<double>(p.offset);
}

// Multiplies frequencies and decays by the position on each pair's axis.
template <typename T>
void move_by_axis(const RopeParams& p, const Token<double>& token, Scratch<T>& scratch) {
  for (int64_t axis = 0; axis < p.num_axes; ++axis) {
    scratch.positions[axis] = position_on(p, token, axis);
  }
  for (int64_t i = 0; i < scratch.half; ++i) {
    const double position = scratch.positions[p.axes[i]];
    scratch.moved_freq[i] = scratch.freq[i] * position;
    if (p.log_decay) scratch.moved_decay[i] = scratch.decay[i] * (position - p.decay_origin);
  }
}

template <typename T, bool Interleaved>
void fill_block(const RopeParams& p, const RopeTensor& tensor, const Token<double>* tokens,
                int64_t count, int64_t head, Scratch<T>& scratch) {
  int64_t loaded = -1;
  for (int64_t t = 0; t < count; ++t) {
    const int64_t row = tokens[t].sequence * p.freq_batch + head * p.freq_head;
    if (row != loaded) load_freq(p, row, scratch);
    loaded = row;
    if (p.axes) move_by_axis(p, tokens[t], scratch);
    const double position = p.axes ? 1.0 : tokens[t].position;
    const auto& freq = p.axes ? scratch.moved_freq : scratch.freq;
    const auto& decay = p.axes ? scratch.moved_decay : scratch.decay;
    const double from_origin = p.axes ? 1.0 : position - p.decay_origin;
    const Angles angles{position, p.amplitude, tensor.decay_sign * from_origin,
                        p.log_decay ? decay.data() : nullptr, p.conjugate};
    Wide<T>*cos = &scratch.cos[t * scratch.stride], *sin = &scratch.sin[t * scratch.stride];
    fill_sincos(freq.data(), scratch.half, angles, cos, sin);
    if constexpr (kInWords<T, Interleaved>) {
      order_by_words(cos, scratch.half), order_by_words(sin, scratch.half);
    }
  }
}

// Asks for the cache lines of the row that is some steps of the loop ahead: left to itself the
// processor looks no further than a page, and for lines that are only written not at all.
template <typename T>
inline void fetch(const T* row, int64_t step, int64_t bytes_ahead, int64_t bytes) {
  constexpr int64_t kLine = 64;
  const int64_t steps = std::max<int64_t>(bytes_ahead / bytes, 1);
  const char* first = reinterpret_cast<const char*>(row + steps * step);
  for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(first + i);
}

template <typename T, bool Interleaved>
void rotate_one(const RopeParams& p, const RopeTensor& tensor, const Token<double>& token,
                int64_t head, const Wide<T>* cos, const Wide<T>* sin) {
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
  const int64_t bytes = p.head_dim * sizeof(T);
  fetch(in, std::min(tensor.in_head, tensor.in_seq), kBytesReadAhead, bytes);
  if (in == out) return;
  fetch(out, std::min(tensor.out_head, tensor.out_seq), kBytesWrittenAhead, bytes);
  if (p.head_dim > p.rotary_dim) {
    std::memcpy(out + p.rotary_dim, in + p.rotary_dim, (p.head_dim - p.rotary_dim) * sizeof(T));
  }
}

template <typename T, bool Interleaved>
void rotate_block(const RopeParams& p, const Token<double>* tokens, int64_t count,
                  Scratch<T>& scratch) {
  const auto one = [&](const RopeTensor& tensor, int64_t t, int64_t head) {
    rotate_one<T, Interleaved>(p, tensor, tokens[t], head, &scratch.cos[t * scratch.stride],
                               &scratch.sin[t * scratch.stride]);
  };
  for (int64_t n = 0; n < p.num_tensors; ++n) {
    const RopeTensor& tensor = p.tensors[n];
    if (p.angle_heads > 1) {
      for (int64_t head = 0; head < tensor.heads; ++head) {
        fill_block<T, Interleaved>(p, tensor, tokens, count, head, scratch);
        for (int64_t t = 0; t < count; ++t) one(tensor, t, head);
      }
      continue;
    }
    if (n == 0 || p.log_decay) fill_block<T, Interleaved>(p, tensor, tokens, count, 0, scratch);
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
  Scratch<T> scratch(p, end - begin);
  Token<double> tokens[kBlock];
  if (p.angle_grad) {
    const int64_t row = p.angle_heads * p.rotary_dim / 2;
    std::fill_n(static_cast<Wide<T>*>(p.angle_grad) + begin * row, (end - begin) * row, Wide<T>{0});
  }
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t count = std::min(kBlock, end - first);
    for (int64_t t = 0; t < count; ++t) {
      tokens[t] = locate<double>(p, (first + t) / p.seqlen, (first + t) % p.seqlen);
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
