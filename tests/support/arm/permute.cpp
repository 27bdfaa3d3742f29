// Powers of permutations.
#include "cpu/permute/kernel.h"
#include "cpu/runtime/threads.h"
#include "random_cycles.h"

namespace extrope {
namespace {

template <typename Word>
void run(const std::string& name, int64_t first_position, bool inverse) {
  constexpr int64_t kBatch = 2, kSeqlen = 41, kHeads = 4, kRows = 2;
  for (int64_t head_dim : {64, 80}) {
    const RandomCycles cycles(kRows, head_dim);
    const int64_t seq = kHeads * head_dim, batch = kSeqlen * seq;
    Random random(head_dim);
    std::vector<Word> in(kBatch * batch), out(in.size());
    for (Word& x : in) x = static_cast<Word>(random.bits());
    PermuteParams p{};
    p.batch = kBatch, p.seqlen = kSeqlen, p.offset = first_position;
    p.num_tensors = 1, p.element_size = sizeof(Word), p.head_dim = head_dim, p.rows = kRows;
    p.inverse = inverse;
    p.tensors[0] = {in.data(), out.data(), batch, seq, head_dim, batch, seq, head_dim, kHeads};
    share_out(kBatch * kSeqlen, kBytesPerThread / 8, [&](int64_t begin, int64_t end) {
      EXTROPE_EXPAND(permute_tokens_, EXTROPE_ISA)(p, cycles.view(), begin, end);
    });
    write("permute/" + name + "/" + std::to_string(head_dim), Moved<Word>{out});
  }
}

}  // namespace

void run_permute() {
  run<uint16_t>("16_bits", 0, false);
  run<uint32_t>("32_bits", (int64_t{1} << 40) + 7, false);
  run<uint64_t>("64_bits", -19, true);
}

}  // namespace extrope
