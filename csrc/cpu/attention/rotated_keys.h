// The cosines and sines for an attention call, and its keys if they are rotated in advance.
//
// Names of the headers:
//   AttentionParams  the call: in region r, q_cos_sin[r] and k_cos_sin[r] rotate q and k[r] as they
//                    are read; empty ones do not
//   PositionMap      the place of a position, to which a region rotates queries or keys: a place is
//                    a position, or a fraction of one
//   Regions          at[r].q_map and k_map: the maps of region r; q_stored and stored: the maps by
//                    which q and k are rotated when given; pair_maps: the numbers of maps in which
//                    each pair of dims has its own; start(r, position): the first key that the
//                    query at `position` sees in region r
//   Starts           of(s): the position of sequence s's first token; nullptr and offset 0: 0
//   CosSinTable      cosines and sines to compute, of the tokens [begin, end) out of `tokens` in
//                    each batch row; `from` is the stored map. rows() views them as CosSin
//   PaddedRows       frequencies (rows, heads, half): rows is the number of sequences, or 1 for all
//   share_out        splits tokens over torch's threads
//   EXTROPE_WIDEST   EXTROPE_KERNEL(isa) for the widest instruction set of this processor
#pragma once

#include <algorithm>
#include <stdexcept>
#include <utility>
#include <vector>

#include "cpu/attention/cos_sin.h"
#include "cpu/runtime/capability.h"
#include "cpu/runtime/kept_pages.h"
#include "cpu/runtime/padded_rows.h"
#include "cpu/runtime/threads.h"

namespace extrope::attention {

// The rotation of queries and keys.
struct RotationArgs {
  PaddedRows inv_freq;
  std::vector<double> log_decay;  // XPOS, padded like inv_freq; empty: none. Queries at place p get
                                  // exp(p * log_decay), keys exp(-p * log_decay)
  double amplitude;               // of rotated dims, for q and k together
};

// Sets p.q_cos_sin, p.k_cos_sin and p.k, and owns their memory.
class RotationTables {
 public:
  // keys_ahead: rotate the keys of each region now. Otherwise every block of queries rotates blocks
  // of keys as it reads them: cheap if products are slow.
  RotationTables(AttentionParams& p, RotationArgs args, bool keys_ahead)
      : p_(p),
        amplitude_(args.amplitude),
        inv_freq_(std::move(args.inv_freq)),
        q_decay_(std::move(args.log_decay)) {
    for (double x : q_decay_) k_decay_.push_back(-x);
    std::vector<CosSinTable> tables;
    for (int64_t r = 0; r < p.regions.count; ++r) tables.push_back(query_table(r));
    int64_t key_tables[kMaxRegions];
    for (int64_t r = 0; r < p.regions.count; ++r) {
      key_tables[r] = find_key_table(r, r > 0 ? key_tables[r - 1] : -1, tables);
    }
    fill(tables);
    for (int64_t r = 0; r < p.regions.count; ++r) {
      if (rotates_queries(r)) p.q_cos_sin[r] = tables[r].rows(batch_rows());
      if (key_tables[r] < 0) continue;
      p.k_cos_sin[r] = tables[key_tables[r]].rows(batch_rows());
      if (!keys_ahead) continue;
      const bool shared = r > 0 && key_tables[r] == key_tables[r - 1];
      p.k[r] = shared ? p.k[r - 1] : rotated_keys(p.k_cos_sin[r], tables[key_tables[r]]);
      p.k_cos_sin[r] = {};
    }
  }
  RotationTables(const RotationTables&) = delete;

 private:
  struct TokenRange {
    int64_t begin, end;
  };

  // Tables have a row per sequence if frequencies or positions differ, else one for all.
  int64_t batch_rows() const {
    const bool shared = inv_freq_.rows == 1 && p_.q_start.stride == 0 && p_.k_start.stride == 0;
    return p_.cu_seqlens || shared ? 1 : p_.batch;
  }

  // Returns false if region r takes queries as they are given.
  bool rotates_queries(int64_t r) const {
    return !(p_.regions.at[r].q_map == p_.regions.q_stored) || amplitude_ != 1.0;
  }

  // Returns the index of the table that rotates region r's keys: -1 if they need no rotation, the
  // queries' table if both rotate alike, else a table of keys. That is the earlier region's,
  // `previous`, if its keys go to the same positions.
  int64_t find_key_table(int64_t r, int64_t previous, std::vector<CosSinTable>& tables) const {
    const PositionMap& map = p_.regions.at[r].k_map;
    if (map == p_.regions.stored) return -1;
    if (rotates_alike(r)) return r;
    const bool shared = r > 0 && map == p_.regions.at[r - 1].k_map && previous != r - 1;
    if (!shared) tables.push_back(key_table(map));
    include(tables.back(), seen_keys(r));
    return static_cast<int64_t>(tables.size()) - 1;
  }

  // Returns true if region r rotates token n the same as a key and as a query.
  bool rotates_alike(int64_t r) const {
    const Region& region = p_.regions.at[r];
    const Starts &q = p_.q_start, &k = p_.k_start;
    const bool aligned = p_.seqlen_q == p_.seqlen_k && q.data == k.data && q.stride == k.stride &&
                         q.offset == k.offset;
    return aligned && region.q_map == region.k_map && p_.regions.q_stored == p_.regions.stored &&
           !is_constant(r) && amplitude_ == 1.0 && q_decay_.empty();
  }

  // Returns the keys that queries see in region r, from the first one of all sequences to the last,
  // and those beside them that kernels read, which read whole parts.
  TokenRange seen_keys(int64_t r) const {
    constexpr int64_t kMostKeyRows = 32;  // in a part, of all instruction sets
    TokenRange seen{p_.seqlen_k, 0};
    for (int64_t s = 0; s < (p_.cu_seqlens ? p_.num_sequences : p_.batch); ++s) {
      const int64_t first_token = p_.cu_seqlens ? p_.cu_seqlens[s] : 0;
      const int64_t seqlen_k = p_.cu_seqlens ? p_.cu_seqlens[s + 1] - first_token : p_.seqlen_k;
      const int64_t seqlen_q = p_.cu_seqlens ? seqlen_k : p_.seqlen_q;
      const int64_t q = p_.q_start.of(s), k = p_.k_start.of(s);
      const auto key = [&](int64_t region, int64_t position) {
        return std::clamp<int64_t>(p_.regions.start(region, position) - k, 0, seqlen_k);
      };
      const int64_t begin = key(r, q), end = key(r + 1, q + seqlen_q - 1);
      if (seqlen_q == 0 || begin >= end) continue;
      seen = {std::min(seen.begin, first_token + begin), std::max(seen.end, first_token + end)};
    }
    if (seen.begin >= seen.end) return {0, 0};
    return {std::max<int64_t>(seen.begin - kMostKeyRows, 0),
            std::min(seen.end + kMostKeyRows, p_.seqlen_k)};
  }

  // Extends a table to these keys. Regions whose keys rotate alike share a table, and any of them
  // may have no key.
  static void include(CosSinTable& t, TokenRange seen) {
    if (seen.begin >= seen.end) return;
    t.begin = t.begin < t.end ? std::min(t.begin, seen.begin) : seen.begin;
    t.end = std::max(t.end, seen.end);
  }

  // Calls run(begin, end) for the tokens of t to fill, in each of `batch` rows.
  template <typename Run>
  void each_token(const CosSinTable& t, int64_t batch, int64_t bytes, const Run& run) const {
    const int64_t count = t.end - t.begin;
    if (count == t.tokens) return share_out(batch * count, bytes, run);
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t at = b * t.tokens + t.begin;
      share_out(count, bytes, [&](int64_t begin, int64_t end) { run(at + begin, at + end); });
    }
  }

  CosSinTable table(const PositionMap& map) const {
    CosSinTable t{};
    t.inv_freq = inv_freq_.values.data();
    t.half = inv_freq_.half, t.padded = inv_freq_.padded;
    t.freq_row = inv_freq_.rows > 1 ? inv_freq_.heads * inv_freq_.padded : 0;
    t.freq_head = inv_freq_.heads > 1 ? inv_freq_.padded : 0;
    t.heads = inv_freq_.heads;
    t.map = map, t.pair_maps = p_.regions.pair_maps;
    t.cu_seqlens = p_.cu_seqlens, t.num_sequences = p_.num_sequences;
    return t;
  }

  // Returns true if region r rotates all queries by the same angles.
  bool is_constant(int64_t r) const {
    return p_.regions.at[r].q_map.is_constant() && p_.regions.q_stored.is_constant();
  }

  // Returns the table of queries of region r, an empty one if they do not rotate.
  CosSinTable query_table(int64_t r) const {
    CosSinTable t = table(p_.regions.at[r].q_map);
    if (!rotates_queries(r)) return t;
    const bool one_row = is_constant(r) && !(p_.cu_seqlens && inv_freq_.rows > 1);
    t.log_decay = q_decay_.empty() ? nullptr : q_decay_.data();
    t.amplitude = amplitude_;
    t.from = p_.regions.q_stored;
    t.start = p_.q_start;
    t.tokens = t.end = one_row ? 1 : p_.seqlen_q;
    if (one_row) t.cu_seqlens = nullptr;
    return t;
  }

  CosSinTable key_table(const PositionMap& map) const {
    CosSinTable t = table(map);
    t.log_decay = k_decay_.empty() ? nullptr : k_decay_.data();
    t.amplitude = 1.0;
    t.from = p_.regions.stored;
    t.start = p_.k_start;
    t.tokens = p_.seqlen_k;
    return t;
  }

  void fill(std::vector<CosSinTable>& tables) {
    int64_t floats = 0;
    for (const CosSinTable& t : tables) floats += batch_rows() * t.tokens * t.stride();
    float* out = static_cast<float*>(memory_.emplace_back(floats * sizeof(float)).data());
#define EXTROPE_KERNEL(isa) fill_cos_sin_##isa
    const FillCosSin kernel = EXTROPE_WIDEST(EXTROPE_KERNEL);
#undef EXTROPE_KERNEL
    for (CosSinTable& t : tables) {
      t.out = out;
      out += batch_rows() * t.tokens * t.stride();
      constexpr int64_t kBytes = 32;  // copying them takes as long as a pair's cosine and sine
      each_token(t, batch_rows(), t.heads * t.half * kBytes,
                 [&](int64_t begin, int64_t end) { kernel(t, begin, end); });
    }
  }

  AttentionTensor rotated_keys(const CosSin& cos_sin, const CosSinTable& t) {
    const bool packed = p_.cu_seqlens != nullptr;
    const int64_t heads = p_.heads_k * p_.head_dim;
    if (p_.dtype == DType::f32) {
      throw std::logic_error("attention: keys of 16 bits alone are rotated ahead");
    }
    constexpr int64_t kElement = 2;  // bytes
    void* keys = memory_.emplace_back(p_.batch * p_.seqlen_k * heads * kElement).data();
    const AttentionTensor out{keys, packed ? 0 : p_.seqlen_k * heads, heads, p_.head_dim,
                              p_.head_dim};
#define EXTROPE_KERNEL(isa) rotate_keys_##isa
    const RotateKeys kernel = EXTROPE_WIDEST(EXTROPE_KERNEL);
#undef EXTROPE_KERNEL
    each_token(t, p_.batch, heads * kElement,
               [&](int64_t begin, int64_t end) { kernel(p_, raw_k_, cos_sin, out, begin, end); });
    return out;
  }

  AttentionParams& p_;
  const double amplitude_;
  const AttentionTensor raw_k_ = p_.k[0];
  const PaddedRows inv_freq_;
  std::vector<double> q_decay_, k_decay_;
  std::vector<Memory> memory_;
};

}  // namespace extrope::attention
