// The merge on the CPU. Compiled once for each instruction set, with EXTROPE_ISA as its name.
//
// The shares of a block of tokens are found first, in vectors of tokens, then each row of the
// result is summed up set by set and rounded once.

#include <algorithm>

#include "cpu/merge/kernel.h"
#include "cpu/merge/shares.h"
#include "cpu/runtime/buffer.h"
#include "cpu/runtime/caches.h"

namespace extrope {
namespace {

// Whether rows of T are added to sums of this type by vectors.
template <typename T, typename Wide>
constexpr bool kByVectors = std::is_same_v<Wide, double> == std::is_same_v<T, double>;

// sum += share * x, or for the first set sum = share * x.
template <typename T, typename Wide>
void add_row(const T* x, Wide share, bool first, Wide* sum, int64_t dim) {
  using V = typename VectorOf<Wide>::type;
  int64_t d = 0;
  if constexpr (kByVectors<T, Wide>) {
    for (; d + Lanes<V>::count <= dim; d += Lanes<V>::count) {
      const V term = load_wide(x + d) * share;
      store(sum + d, first ? term : load<V>(sum + d) + term);
    }
  }
  for (; d < dim; ++d) {
    const Wide term = static_cast<Wide>(widen(x[d])) * share;
    sum[d] = first ? term : sum[d] + term;
  }
}

// Whether rows of the result are written by streaming stores: few would be in a cache when they are
// read, and whole lines need not be read before they are written.
bool streams_output(const MergeParams& p) {
  const MergeRows& to = p.merged;
  const int64_t size = to.dtype == DType::f32 ? 4 : 2;
  const bool lines = reinterpret_cast<uintptr_t>(to.out) % 64 == 0 &&
                     (to.out_batch | to.out_seq | to.out_head) % (64 / size) == 0;
  return kFloats == 16 && !p.in_place && !p.wide && lines &&
         p.batch * p.seqlen * p.heads * p.head_dim * size > kMostCached;
}

#if defined(__AVX512F__)
inline __m256i narrowed(bf16, floats v) {
  return _mm512_cvtepi32_epi16(bits_as<__m512i>(round_bf16(v) >> 16));
}
inline __m256i narrowed(f16, floats v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }

// Two vectors, which are a line of 16-bit values.
template <typename T>
void stream_two(T* to, floats a, floats b) {
  const __m512i low = _mm512_castsi256_si512(narrowed(T{}, a));
  stream_line(to, _mm512_inserti64x4(low, narrowed(T{}, b), 1));
}
#endif

template <typename T, typename Wide>
void write_row(const Wide* sum, T* out, int64_t dim, bool streaming) {
  using V = typename VectorOf<Wide>::type;
  int64_t d = 0;
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<Wide, float> && sizeof(T) == 2) {
    for (; streaming && d + 2 * kFloats <= dim; d += 2 * kFloats) {
      stream_two(out + d, load<V>(sum + d), load<V>(sum + d + kFloats));
    }
  }
#endif
  if constexpr (kByVectors<T, Wide>) {
    for (; d + Lanes<V>::count <= dim; d += Lanes<V>::count) {
      const V v = load<V>(sum + d);
      if constexpr (std::is_same_v<T, float>) {
        streaming ? store_streaming(out + d, v) : store_narrow(out + d, v);
      } else {
        store_narrow(out + d, v);
      }
    }
  }
  if constexpr (std::is_same_v<T, double>) {
    for (; d < dim; ++d) out[d] = sum[d];
  } else {
    for (; d < dim; ++d) narrow(static_cast<float>(sum[d]), out[d]);
  }
}

// run(zero) with a zero of the type.
template <typename Run>
EXTROPE_INLINE void with_type(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::f32:
      return run(float{});
    case DType::f64:
      return run(double{});
    case DType::bf16:
      return run(bf16{});
    case DType::f16:
      return run(f16{});
  }
}

template <typename Wide, typename Lse>
class Merge {
 public:
  explicit Merge(const MergeParams& p)
      : p_(p),
        streaming_(streams_output(p)),
        shares_(p.heads * p.num_sets * kTokens),
        sum_(p.head_dim) {}
  ~Merge() {
    if (streaming_) fence_streaming_stores();
  }

  // Up to kTokens tokens of one sequence.
  void block(int64_t first, int64_t count) {
    for (int64_t head = 0; head < p_.heads; ++head) {
      Wide* shares = of_head(head);
      Wide joint[kTokens];
      read_lses<Lse>(p_, first, head, count, shares);
      find_shares(shares, p_.num_sets, joint);
      write_lses<Lse>(p_, first, head, count, joint);
    }
    // Whichever goes through memory forward.
    if (p_.merged.out_head < p_.merged.out_seq) {
      for (int64_t t = 0; t < count; ++t) {
        for (int64_t head = 0; head < p_.heads; ++head) row(first, t, head);
      }
    } else {
      for (int64_t head = 0; head < p_.heads; ++head) {
        for (int64_t t = 0; t < count; ++t) row(first, t, head);
      }
    }
  }

 private:
  Wide* of_head(int64_t head) { return shares_.data() + head * p_.num_sets * kTokens; }

  template <typename T>
  static T* at(const MergeRows& rows, int64_t batch, int64_t seq, int64_t head) {
    return static_cast<T*>(rows.out) + batch * rows.out_batch + seq * rows.out_seq +
           head * rows.out_head;
  }

  void row(int64_t first, int64_t t, int64_t head) {
    const int64_t batch = first / p_.seqlen, seq = first % p_.seqlen + t;
    const Wide* shares = of_head(head) + t;
    bool empty = true;
    for (int64_t n = 0; n < p_.num_sets; ++n) {
      const MergeRows& set = p_.sets[n];
      const Wide share = shares[n * kTokens];
      if (share == kNoKeys) continue;
      with_type(set.dtype, [&](auto zero) {
        add_row(at<decltype(zero)>(set, batch, seq, head), share, empty, sum_.data(), p_.head_dim);
      });
      empty = false;
    }
    if (empty && p_.in_place) return;
    if (empty) std::fill_n(sum_.data(), p_.head_dim, Wide{0});
    with_type(p_.merged.dtype, [&](auto zero) {
      write_row(sum_.data(), at<decltype(zero)>(p_.merged, batch, seq, head), p_.head_dim,
                streaming_);
    });
  }

  const MergeParams& p_;
  bool streaming_;
  Buffer<Wide> shares_, sum_;
};

template <typename Wide, typename Lse>
void merge(const MergeParams& p, int64_t begin, int64_t end) {
  Merge<Wide, Lse> merge(p);
  for (int64_t count, first = begin; first < end; first += count) {
    count = std::min({kTokens, end - first, p.seqlen - first % p.seqlen});
    merge.block(first, count);
  }
}

}  // namespace

void EXTROPE_EXPAND(merge_tokens_, EXTROPE_ISA)(const MergeParams& p, int64_t begin, int64_t end) {
  if (!p.wide) return merge<float, float>(p, begin, end);
  p.lse_is_f64 ? merge<double, double>(p, begin, end) : merge<double, float>(p, begin, end);
}

}  // namespace extrope
