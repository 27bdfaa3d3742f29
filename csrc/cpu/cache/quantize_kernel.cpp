// Divides rows by their scale and rounds them to e4m3. Compiled once per instruction set, with
// EXTROPE_ISA as its name.

#include "cpu/cache/quantize.h"
#include "cpu/simd/e4m3.h"

namespace extrope {
namespace {

template <typename T>
void quantize_row(const T* in, int64_t count, float scale, e4m3* out) {
  int64_t i = 0;
  if constexpr (!std::is_same_v<T, double>) {
    for (; i + kFloats <= count; i += kFloats) store_narrow(out + i, load_wide(in + i) / scale);
  }
  for (; i < count; ++i) narrow(static_cast<float>(widen(in[i])) / scale, out[i]);
}

template <typename T>
void quantize_rows(const QuantizeParams& p, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    if (p.out_rows[n] < 0) continue;
    const T* in =
        static_cast<const T*>(p.in.data) + n / p.seqlen * p.in.block + n % p.seqlen * p.in.slot;
    e4m3* out = reinterpret_cast<e4m3*>(p.out) + p.out_rows[n];
    for (int64_t head = 0; head < p.heads; ++head) {
      quantize_row(in + head * p.in.head, p.head_dim, p.scale[head], out + head * p.out_head);
    }
  }
}

}  // namespace

void EXTROPE_EXPAND(quantize_rows_, EXTROPE_ISA)(const QuantizeParams& p, int64_t begin,
                                                 int64_t end) {
  switch (p.dtype) {
    case DType::f32:
      return quantize_rows<float>(p, begin, end);
    case DType::f64:
      return quantize_rows<double>(p, begin, end);
    case DType::bf16:
      return quantize_rows<bf16>(p, begin, end);
    case DType::f16:
      return quantize_rows<f16>(p, begin, end);
  }
}

}  // namespace extrope
