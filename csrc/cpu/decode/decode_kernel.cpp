// Attention of a few query tokens over a key/value cache on the CPU. Compiled once per instruction
// set, with EXTROPE_ISA as its name.
//
// The keys of a block of queries (tokens of one sequence, in all q heads) are cut into splits. For
// each split, decode_splits computes partial sums in one pass over the cache; merge_splits adds
// those of a row's splits up. A row is one token in one q head. Under each head of k, rows are in
// the order token (slow), q head (fast). BlockM of them at a time meet kBlockN = 32 keys of one
// head, with online softmax:
//
//   S = K Q^T               (kBlockN, BlockM)   logits to base 2
//   P = exp2(S - row_max)   (kBlockN, BlockM)
//   O = O * rescale + P^T V (BlockM, head_dim of v)
//
// S is key-major: a vector holds all BlockM rows of some keys. So the softmax needs no
// transposition, and the sums over values read P in order. Keys and values are read where they lie
// in the cache, without a copy. The cache has key j rotated to stored(j), where the score method
// stores it. A region in which it needs another position, k_map(j), rotates it on, by the rest of
// the angle: in registers, beside its products (RotatingRows), or into a buffer of plain floats.
//
// load_dims reads rows of the cache in the cheapest form: two vectors of bf16 as 32-bit words, the
// even dims in the first and the odd ones in the second; e4m3 divided by kUnitE4m3, a power of two.
// Queries were converted to match, except in regions that rotate keys on, and load_wide reads them
// as they lie; write_partial and merge_row undo it for O.
//
// Types of the headers:
//   QueryBlock   tokens [first_token, last_token) of one sequence, and the splits of its keys
//   Split        `queries`, its QueryBlock, and `index`, which of the splits
//   Queries      a QueryBlock's queries in float, times all factors of their logits, rotated for
//                each region: (heads of k, padded_rows, stride); `rows` per head are not padding
//   Regions      start(r, position): the first key of region r for the query at `position`, in the
//                sliding window; start(count, position): the first key after its own
//   RowPointers  row(n): the row of a block's key or value n, in one head
//   KeyRotation  the angles of a block's keys in a region that rotates them on
//   BlockRows    the rows of the block of keys at hand, and of the next one
//   Prefetch     what to fetch beside the work on a block; none by default
//   floats       a vector of kFloats (4, 8 or 16) lanes
// A key's index in its sequence is its position.

#include <algorithm>
#include <cmath>

#include "cpu/decode/kernels.h"
#include "cpu/decode/prefetch.h"
#include "cpu/decode/queries.h"
#include "cpu/decode/rows.h"
#include "cpu/runtime/buffer.h"
#include "cpu/simd/exp2.h"
#include "cpu/simd/softmax.h"
#include "cpu/simd/sum.h"

namespace extrope {
namespace {

// row_max starts here: below any logit, and finite, so that row_max - row_max is 0, not NaN.
constexpr float kLowest = -1e30f;

// -------------------------------------------------------------------------------------------------
// BlockM rows against a block of keys and values of one head. BlockM is 1, 2 or 4, so that it
// divides a vector; the first Valid rows are computed: all queries, and padding if only one is left
// of four. head_dim is a multiple of kFloats, or bind.cpp takes narrower kernels.
//
// Element: of the rows read, Cached (the cache's type), or float if they rotate on. RowPointers
// have a row for each key: row(n).

// The keys of one product: enough to keep at least kFloats sums in flight.
template <int BlockM>
constexpr int kKeysAtOnce = kFloats / BlockM > 2 ? kFloats / BlockM : 2;

// sums[key][row] += q[row][d] * keys[first_key + key][d], lane by lane, for `Vectors` vectors of
// dims from d on. q is (BlockM, q_stride).
template <int BlockM, int Valid, int Keys, int Vectors, typename Element>
EXTROPE_INLINE void add_products(const float* q, int64_t q_stride, RowPointers<Element> keys,
                                 int64_t first_key, int64_t d, floats (&sums)[Keys * BlockM]) {
  floats y[Valid][Vectors];  // queries, float already; x is a key, converted to float
#pragma GCC unroll 4
  for (int r = 0; r < Valid; ++r) load_wide(q + r * q_stride + d, y[r]);
#pragma GCC unroll 16
  for (int k = 0; k < Keys; ++k) {
    floats x[Vectors];
    load_dims(keys.row(first_key + k) + d, x);
#pragma GCC unroll 4
    for (int r = 0; r < Valid; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) sums[k * BlockM + r] += y[r][v] * x[v];
    }
  }
}

// The same in all dims, for keys as they lie.
template <int BlockM, int Valid, int Keys, typename Element>
EXTROPE_INLINE void add_all_products(const float* q, int64_t q_stride, RowPointers<Element> keys,
                                     int64_t first_key, int64_t head_dim,
                                     floats (&sums)[Keys * BlockM]) {
  int64_t d = 0;
  // Some elements are read two vectors at once: kTogether is 2 for them, else 1.
  for (; d + kTogether<Element> * kFloats <= head_dim; d += kTogether<Element> * kFloats) {
    add_products<BlockM, Valid, Keys, kTogether<Element>>(q, q_stride, keys, first_key, d, sums);
  }
  for (; d < head_dim; d += kFloats) {
    add_products<BlockM, Valid, Keys, 1>(q, q_stride, keys, first_key, d, sums);
  }
}

// The keys of a block in one head that rotate on as they are read; see KeyRotation::is_of_vectors.
template <typename T>
struct RotatingRows {
  RowPointers<T> keys;
  KeyRotation::KeyAngles angles;
};

// The same for keys that rotate on: dims d and half + d are a pair, and q is in the order of dims.
template <int BlockM, int Valid, int Keys, typename T>
EXTROPE_INLINE void add_all_products(const float* q, int64_t q_stride, RotatingRows<T> rows,
                                     int64_t first_key, int64_t head_dim,
                                     floats (&sums)[Keys * BlockM]) {
  const int64_t half = head_dim / 2;
  for (int64_t d = 0; d < half; d += kFloats) {
    floats first[Valid], second[Valid];  // of queries
#pragma GCC unroll 4
    for (int r = 0; r < Valid; ++r) {
      first[r] = load<floats>(q + r * q_stride + d);
      second[r] = load<floats>(q + r * q_stride + half + d);
    }
#pragma GCC unroll 16
    for (int k = 0; k < Keys; ++k) {
      const T* key = rows.keys.row(first_key + k) + d;
      const int64_t at = rows.angles.at[first_key + k] + d;
      const floats a = load_wide(key), b = load_wide(key + half);
      const floats cos = load<floats>(rows.angles.cos + at),
                   sin = load<floats>(rows.angles.sin + at);
      const floats rotated_a = a * cos - b * sin, rotated_b = b * cos + a * sin;
#pragma GCC unroll 4
      for (int r = 0; r < Valid; ++r) {
        floats& sum = sums[k * BlockM + r];
        sum += first[r] * rotated_a;
        sum += second[r] * rotated_b;
      }
    }
  }
}

// S = K Q^T: logits[key][row] for `count` keys, padding included: a multiple of kKeysAtOnce. Keys:
// RowPointers or RotatingRows.
template <int BlockM, int Valid, typename Keys, typename Cached>
void multiply_keys(const float* q, int64_t q_stride, Keys keys, int64_t count, int64_t head_dim,
                   Prefetch<Cached>& prefetch, float* logits) {
  // A local, to stay in registers: each fetch moves its addresses on.
  Prefetch<Cached> meanwhile = prefetch;
  constexpr int kKeys = kKeysAtOnce<BlockM>;
  for (int64_t key = 0; key < count; key += kKeys) {
    floats sums[kKeys * BlockM] = {};  // each over a part of the dims in each lane
    add_all_products<BlockM, Valid, kKeys>(q, q_stride, keys, key, head_dim, sums);
    // logits[key * BlockM + i] = the sum of the lanes of sums[i]. Rows from Valid on get 0.
    sum_lanes<kKeys * BlockM>(sums, logits + key * BlockM);
    meanwhile.fetch_at_logits(key, kKeys);
  }
  prefetch = meanwhile;
}

// The state of the online softmax of BlockM rows: lane i belongs to row i % BlockM.
struct Softmax {
  floats row_max;  // the same in all lanes of a row
  floats row_sum;  // the sum of a row's lanes is the row's
};

// P = exp2(S - row_max) for `size` logits, a multiple of kFloats; returns the rescale factors of
// earlier sums.
template <int BlockM>
floats softmax_block(float* logits, int64_t size, Softmax& softmax) {
  floats row_max = softmax.row_max;
  for (int64_t i = 0; i < size; i += kFloats) row_max = larger(load<floats>(logits + i), row_max);
  // The largest of a row's lanes, which are BlockM apart. across<n> exchanges lanes n apart; 0
  // stands for an n that this vector is too short for, in a branch not taken.
  if constexpr (BlockM <= 1) row_max = larger(row_max, across<1>(row_max));
  if constexpr (BlockM <= 2) row_max = larger(row_max, across<2>(row_max));
  if constexpr (kFloats > 4) row_max = larger(row_max, across<kFloats == 4 ? 0 : 4>(row_max));
  if constexpr (kFloats > 8) row_max = larger(row_max, across<kFloats <= 8 ? 0 : 8>(row_max));
  floats sum{};
  for (int64_t i = 0; i < size; i += kFloats) {
    const floats probability = exp2_vector(load<floats>(logits + i) - row_max);
    store(logits + i, probability);
    sum += probability;
  }
  const floats rescale = exp2_vector(softmax.row_max - row_max);
  softmax.row_max = row_max;
  softmax.row_sum = softmax.row_sum * rescale + sum;
  return rescale;
}

// O = O * rescale + P^T V for `count` keys, in `Columns` vectors of dims from d on. `out` is
// (BlockM, head_dim_v). Row r's rescale is in lane r.
template <int BlockM, int Valid, int Columns, typename Cached>
inline void add_columns(const float* probabilities, RowPointers<Cached> values, int64_t count,
                        int64_t d, const floats& rescale, Prefetch<Cached> prefetch, float* out,
                        int64_t head_dim_v) {
  floats acc[Valid * Columns] = {};  // sums of this block: fewer roundings than over all keys
  for (int64_t key = 0; key < count; ++key) {
    floats x[Columns];
    load_dims(values.row(key) + d, x);
#pragma GCC unroll 4
    for (int r = 0; r < Valid; ++r) {
      // Subtracts zero: adding it would change -0, and cost an addition.
      const floats probability = probabilities[key * BlockM + r] - floats{};
#pragma GCC unroll 8
      for (int c = 0; c < Columns; ++c) acc[r * Columns + c] += probability * x[c];
    }
    prefetch.fetch_at_value(key);
  }
#pragma GCC unroll 4
  for (int r = 0; r < Valid; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < Columns; ++c) {
      float* to = out + r * head_dim_v + d + c * kFloats;
      store(to, load<floats>(to) * rescale[r] + acc[r * Columns + c]);
    }
  }
}

// O = O * rescale + P^T V for `count` keys, in all dims.
template <int BlockM, int Valid, typename Cached>
void add_values(const float* probabilities, RowPointers<Cached> values, int64_t count,
                int64_t head_dim_v, const floats& rescale, Prefetch<Cached> prefetch, float* out) {
  // Eight sums at once (BlockM * kColumns) hide the latency of their additions. Vectors of 16
  // floats have registers for the 16 of BlockM 4, which load each value half as often.
  constexpr int kColumns = kFloats == 16 ? (BlockM == 1 ? 8 : 4) : 8 / BlockM;
  int64_t d = 0;
  const auto add = [&](auto columns) __attribute__((always_inline)) {
    add_columns<BlockM, Valid, decltype(columns)::value>(probabilities, values, count, d, rescale,
                                                         prefetch, out, head_dim_v);
    prefetch = {};  // now none: the first columns prefetched for all
    d += decltype(columns)::value * kFloats;
  };
  while (d + kColumns * kFloats <= head_dim_v) add(std::integral_constant<int, kColumns>{});
  constexpr int kAtOnce = kTogether<Cached>;
  while (d + kAtOnce * kFloats <= head_dim_v) add(std::integral_constant<int, kAtOnce>{});
  while (d < head_dim_v) add(std::integral_constant<int, 1>{});
}

// -------------------------------------------------------------------------------------------------
// A split

// Attends from a block of queries to one split of their keys at a time; one for each thread.
template <typename T, typename Cached>
class SplitWorker {
 public:
  explicit SplitWorker(const DecodeParams& p)
      : p_(p),
        head_dim_(p.cache.head_dim),
        head_dim_v_(p.cache.head_dim_v),
        softcap_(static_cast<float>(p.softcap * kLog2E)),
        queries_(p),
        rows_(p.cache) {}

  // Consecutive splits of the same queries load these once.
  void run(const Split& split) {
    const QueryBlock* block = split.queries;
    if (queries_.block() != block) queries_.start(block);
    const int64_t first = queries_.first_position(), last = queries_.last_position();
    const int64_t begin = block->first_key + split.index * block->split_size;
    const int64_t end = std::min(begin + block->split_size, last + 1);
    // For each region that has some of these keys, if not done yet; in regions that rotate keys on,
    // start_keys() does it, block by block.
    queries_.rotate(begin, end);
    const int64_t rows = p_.cache.heads * queries_.padded_rows();
    out_.assign(rows * head_dim_v_, 0.0f);
    softmax_.assign(rows / queries_.block_m(), {floats{} + kLowest, floats{}});
    // Cuts at the beginnings of regions for the first or the last row: between two such edges the
    // set of regions that rows see does not change. start(count) is the first key after a row's
    // own; all starts are 0 before position 0.
    for (int64_t next, key = begin; key < end; key = next) {
      next = end;
      for (int64_t r = 0; r <= p_.regions.count; ++r) {
        for (const int64_t edge : {p_.regions.start(r, first), p_.regions.start(r, last)}) {
          if (edge > key) next = std::min(next, edge);
        }
      }
      attend(key, next);
    }
    write_partial(split);
  }

 private:
  // The regions of the keys between two edges: those that some row sees them in. `masked`: some row
  // does not see all of these keys, or they are in several regions.
  struct Seen {
    int64_t first_region, last_region;
    bool masked;
  };

  // A block of keys and values of one head.
  struct HeadBlock {
    RowPointers<Cached> keys, values;
    Prefetch<Cached> prefetch;          // of later rows
    const RowPointers<float>* rotated;  // (regions,): keys of regions that rotate them on
    int64_t first_key;                  // counted from position 0
    int64_t count;   // keys; rows from there up to padded are later keys, or the last one again
    int64_t padded;  // a multiple of kKeysAtOnce
  };

  // Positions rise with the rows: the first and the last one decide.
  Seen seen_regions(int64_t begin, int64_t end) const {
    const Regions& regions = p_.regions;
    const int64_t first = queries_.first_position(), last = queries_.last_position();
    int64_t lowest = 0, highest = regions.count - 1;
    while (lowest < highest && regions.start(lowest + 1, last) <= begin) ++lowest;
    while (highest > lowest && regions.start(highest, first) >= end) --highest;
    // The last row's keys begin last. The first row's end first, with its own at `first`.
    const bool masked = lowest < highest || begin < regions.start(0, last) || end > first + 1;
    return {lowest, highest, masked};
  }

  // Attends to the keys [begin, end), between two edges.
  void attend(int64_t begin, int64_t end) {
    const Seen seen = seen_regions(begin, end);
    const int64_t all_end = queries_.last_position() + 1;
    // find_next() locates the next block's rows, from `begin` on; advance() makes it the current.
    rows_.find_next(*queries_.block(), begin, all_end);
    for (int64_t key = begin; key < end; key += kBlockN) {
      const int64_t count = std::min<int64_t>(kBlockN, end - key);
      rows_.advance(*queries_.block(), key + count, all_end);  // finds one past `end` too
      // If r rotates keys on, key j by u(j) = k_map(j) - stored(j): finds the cosines and sines of
      // u(j) - u(key), and rotates queries to q_map(i) - u(key). So no angle is large. (If each
      // pair has its own map, keys rotate by all of u(j), and queries stay.)
      for (int64_t r = seen.first_region; r <= seen.last_region; ++r) {
        queries_.start_keys(r, key, count);
      }
      // All heads of a block in sequence: they usually are neighbours in memory.
      for (head_ = 0; head_ < p_.cache.heads; ++head_) {
        if (queries_.block_m() == 1) attend_head<1>(key, count, seen);
        if (queries_.block_m() == 2) attend_head<2>(key, count, seen);
        if (queries_.block_m() == kMaxBlockM) attend_head<kMaxBlockM>(key, count, seen);
      }
    }
  }

  // Attends from all rows of a head to `count` keys.
  template <int BlockM>
  void attend_head(int64_t first_key, int64_t count, const Seen& seen) {
    // Padded rows stay inside a block's rows and logits_.
    static_assert(kBlockN % kKeysAtOnce<BlockM> == 0);
    const RowPointers<Cached> keys = rows_.keys(head_);
    RowPointers<float> rotated[kMaxRegions];  // set only for regions that rotate keys on
    for (int64_t r = seen.first_region; r <= seen.last_region; ++r) {
      KeyRotation* rotation = queries_.key_rotation(r);  // nullptr: r takes keys as they lie
      if (rotation && !rotates_in_registers(*rotation)) rotated[r] = rotation->rotate(keys, head_);
    }
    const HeadBlock block{.keys = keys,
                          .values = rows_.values(head_),
                          .prefetch = rows_.prefetch(head_),
                          .rotated = rotated,
                          .first_key = first_key,
                          .count = count,
                          .padded = round_up(count, kKeysAtOnce<BlockM>)};
    for (int64_t row = 0; row < queries_.padded_rows(); row += BlockM) {
      // If one row of four is left, the next one, padding, is computed as well.
      if (const int64_t left = queries_.rows() - row; left <= 2) {
        attend_rows<BlockM, std::min(BlockM, 2)>(block, row, seen);
      } else if (left == 3) {
        attend_rows<BlockM, std::min(BlockM, 3)>(block, row, seen);
      } else {
        attend_rows<BlockM, BlockM>(block, row, seen);
      }
    }
  }

  // Attends from BlockM rows, from `row` of the head on, and computes the first Valid: all queries,
  // and padding if only one is left of four.
  template <int BlockM, int Valid>
  void attend_rows(const HeadBlock& block, int64_t row, const Seen& seen) {
    const int64_t all_row = head_ * queries_.padded_rows() + row;  // counted through all heads
    const int64_t q_stride = queries_.stride(), size = block.padded * BlockM;  // size: of logits
    // The head's first rows prefetch, beside the products of their first region and their values.
    Prefetch<Cached> none, prefetch = row == 0 ? block.prefetch : none;

    // S = K Q^T, region by region; each row takes a later region's logits from its start on.
    for (int64_t r = seen.first_region; r <= seen.last_region; ++r) {
      const bool is_first_region = r == seen.first_region;
      Prefetch<Cached>& meanwhile = is_first_region ? prefetch : none;
      const float* q = queries_.row(r, head_, row);
      float* logits = is_first_region ? logits_ : region_logits_;
      // Keys that rotate on are multiplied as plain floats; so are this region's queries.
      const KeyRotation* rotation = queries_.key_rotation(r);
      if (rotation && rotates_in_registers(*rotation)) {
        const RotatingRows<Cached> keys{block.keys, rotation->angles(head_)};
        multiply_keys<BlockM, Valid>(q, q_stride, keys, block.padded, head_dim_, meanwhile, logits);
      } else if (rotation) {
        multiply_keys<BlockM, Valid>(q, q_stride, block.rotated[r], block.padded, head_dim_,
                                     meanwhile, logits);
      } else {
        multiply_keys<BlockM, Valid>(q, q_stride, block.keys, block.padded, head_dim_, meanwhile,
                                     logits);
      }
      if (!is_first_region) take_region<BlockM>(r, row, block);
    }
    // With a softcap, S = softcap_ * tanh(S): queries were scaled by 1 / softcap, not by log2(e).
    for (int64_t i = 0; softcap_ > 0 && i < size; i += kFloats) {
      floats logits[1] = {load<floats>(logits_ + i)};
      apply_softcap(logits, softcap_);
      store(logits_ + i, logits[0]);
    }
    if (seen.masked) mask<BlockM>(row, block);
    // S of the rows after the block's keys
    std::fill(logits_ + block.count * BlockM, logits_ + size, -INFINITY);

    // P = exp2(S - row_max)
    const floats rescale = softmax_block<BlockM>(logits_, size, softmax_[all_row / BlockM]);

    // O = O * rescale + P^T V
    add_values<BlockM, Valid>(logits_, block.values, block.count, head_dim_v_, rescale, prefetch,
                              &out_[all_row * head_dim_v_]);
  }

  // Keys that several blocks of rows of a head read are rotated once, before.
  bool rotates_in_registers(const KeyRotation& rotation) const {
    return rotation.is_of_vectors() && queries_.padded_rows() == queries_.block_m();
  }

  // Replaces earlier regions' logits by region r's, from each row's start of that region on. The
  // positions of padding run past the last token; nothing reads its logits.
  template <int BlockM>
  void take_region(int64_t r, int64_t row, const HeadBlock& block) {
    for (int64_t i = 0; i < BlockM; ++i) {
      const int64_t start = p_.regions.start(r, queries_.position_of(row + i)) - block.first_key;
      for (int64_t n = std::max<int64_t>(start, 0); n < block.count; ++n) {
        logits_[n * BlockM + i] = region_logits_[n * BlockM + i];
      }
    }
  }

  // Hides the keys before a row's first one and those after its position.
  template <int BlockM>
  void mask(int64_t row, const HeadBlock& block) {
    for (int64_t i = 0; i < BlockM; ++i) {
      const int64_t position = queries_.position_of(row + i);
      const int64_t first = p_.regions.start(0, position);
      for (int64_t n = 0; n < block.count; ++n) {
        const int64_t key = block.first_key + n;
        if (key < first || key > position) logits_[n * BlockM + i] = -INFINITY;
      }
    }
  }

  // Writes (heads of k, rows, head_dim_v + 2): O, row_max and row_sum. p_.partial has the splits of
  // a QueryBlock in order, from row split.queries->partial on.
  void write_partial(const Split& split) {
    const int64_t rows = queries_.rows(), block_m = queries_.block_m();
    const int64_t width = head_dim_v_ + 2, all_rows = p_.cache.heads * rows;
    float* partial = p_.partial + (split.queries->partial + split.index * all_rows) * width;
    for (int64_t r = 0; r < all_rows; ++r, partial += width) {
      // Padding is left out.
      const int64_t row = r / rows * queries_.padded_rows() + r % rows, lane = row % block_m;
      const Softmax& softmax = softmax_[row / block_m];
      float row_sum = 0;
      for (int64_t n = lane; n < kFloats; n += block_m) row_sum += softmax.row_sum[n];
      std::copy_n(&out_[row * head_dim_v_], head_dim_v_, partial);
      // Only bf16 is read in pairs, which leaves its dims in the order of words.
      if constexpr (kReadInPairs<Cached>) order_by_dims(partial, head_dim_v_);
      partial[head_dim_v_] = softmax.row_max[lane];
      partial[head_dim_v_ + 1] = row_sum;
    }
  }

  const DecodeParams& p_;
  const int64_t head_dim_, head_dim_v_;  // of queries and keys, of values
  const float softcap_;                  // log2(e) included; 0: none
  Queries<T, Cached> queries_;
  BlockRows<Cached> rows_;
  int64_t head_ = 0;         // the current head of k
  Buffer<float> out_;        // (heads of k, padded rows, head_dim_v_): O
  Buffer<Softmax> softmax_;  // (heads of k, padded rows / BlockM)
  // (kBlockN, BlockM): S and then P, and S in a later region
  alignas(64) float logits_[kBlockN * kMaxBlockM], region_logits_[kBlockN * kMaxBlockM];
};

// -------------------------------------------------------------------------------------------------
// All splits of a row

// Adds up the splits of one row, in order: out, and lse. `sums` is (head_dim of v,).
template <typename T>
void merge_row(const DecodeParams& p, const QueryBlock& queries, int64_t row, float* sums) {
  const int64_t dim = p.cache.head_dim_v, width = dim + 2;
  const int64_t group = p.heads_q / p.cache.heads;  // q heads per head of k
  const int64_t tokens = queries.last_token - queries.first_token, rows = tokens * p.heads_q;
  const float* first_partial = p.partial + (queries.partial + row) * width;
  // Rows are in the order head of k, token, q head of the group.
  // `token` of packed sequences counts through all of them, in batch 0.
  const int64_t token = queries.first_token + row / group % tokens;
  const int64_t head = row / (tokens * group) * group + row % group;
  float row_max = kLowest, row_sum = 0;
  for (int64_t n = 0; n < queries.num_splits; ++n) {
    row_max = std::max(row_max, first_partial[n * rows * width + dim]);
  }
  std::fill_n(sums, dim, 0.0f);
  for (int64_t n = 0; n < queries.num_splits; ++n) {
    const float* partial = first_partial + n * rows * width;
    const float rescale = std::exp2(partial[dim] - row_max);
    row_sum += rescale * partial[dim + 1];
    for (int64_t d = 0; d < dim; ++d) sums[d] += rescale * partial[d];
  }
  constexpr double kLn2 = 0.69314718055994531;
  float scale = row_sum == 0 ? 0.0f : 1.0f / row_sum;
  float& lse = p.lse[(queries.batch * p.heads_q + head) * p.seqlen_q + token];
  lse =
      row_sum == 0 ? -INFINITY : static_cast<float>((row_max + std::log2(double{row_sum})) * kLn2);
  if (p.sinks.data) join_sink(p.sinks.of(head), scale, lse);  // changes both
  // Values were read divided by the unit of e4m3.
  if (p.cache.is_e4m3()) scale *= p.cache.v_scale[head / group] * kUnitE4m3;
  T* out = static_cast<T*>(p.out) + ((queries.batch * p.seqlen_q + token) * p.heads_q + head) * dim;
  for (int64_t d = 0; d < dim; ++d) narrow(sums[d] * scale, out[d]);
}

template <typename T>
void merge_splits(const DecodeParams& p, const QueryBlock* queries, int64_t count) {
  Buffer<float> sums(p.cache.head_dim_v);
  for (int64_t n = 0; n < count; ++n) {
    const int64_t tokens = queries[n].last_token - queries[n].first_token;
    for (int64_t r = 0; r < tokens * p.heads_q; ++r) merge_row<T>(p, queries[n], r, sums.data());
  }
}

// Calls run(x) with a value of the element type of queries.
template <typename Run>
void with_type(DType dtype, Run run) {
  switch (dtype) {
    case DType::bf16:
      return run(bf16{});
    case DType::f16:
      return run(f16{});
    default:
      return run(float{});
  }
}

// Calls run(x, y) with values of the element types of queries, cache.dtype, and of the cache.
template <typename Run>
void with_types(const KVCache& cache, Run run) {
  with_type(cache.dtype, [&](auto type) {
    if (cache.is_e4m3()) return run(type, e4m3{});
    run(type, type);
  });
}

}  // namespace

void EXTROPE_EXPAND(decode_splits_, EXTROPE_ISA)(const DecodeParams& p, const Split* splits,
                                                 int64_t count) {
  with_types(p.cache, [&](auto type, auto cached) {
    SplitWorker<decltype(type), decltype(cached)> worker(p);
    for (int64_t n = 0; n < count; ++n) worker.run(splits[n]);
  });
}

void EXTROPE_EXPAND(merge_splits_, EXTROPE_ISA)(const DecodeParams& p, const QueryBlock* queries,
                                                int64_t count) {
  with_type(p.cache.dtype, [&](auto type) { merge_splits<decltype(type)>(p, queries, count); });
}

}  // namespace extrope
