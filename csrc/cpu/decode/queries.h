// The queries of a block, scaled, and rotated for each region of keys.
//
// Cached keys are rotated to their stored position. A region with that position uses them
// unchanged, and rotates only queries; for any other region keys rotate on, block by block.
#pragma once

#include <optional>

#include "cpu/decode/key_rotation.h"
#include "cpu/decode/rows.h"

namespace extrope {
namespace {

constexpr int kMaxBlockM = 4;  // the largest block_m
constexpr double kLog2E = 1.4426950408889634;

// Rows of one head of k after another; within them the order is token, then q head of the group.
template <typename T, typename Cached>
class Queries {
 public:
  explicit Queries(const DecodeParams& p)
      : p_(p),
        rotation_(p.freqs.of_rows(p.cache.head_dim)),
        group_(p.heads_q / p.cache.heads),
        logit_scale_(p.softmax_scale * (p.softcap > 0 ? 1.0 / p.softcap : kLog2E)),
        stride_(round_up(p.cache.head_dim, kFloats)),
        cos_(round_up(p.freqs.half, kFloats)),
        sin_(cos_.size()) {
    for (int64_t r = 0; r < p.regions.count; ++r) {
      const PositionMap& k_map = p.regions.at[r].k_map;
      if (!(k_map == p.regions.stored)) regions_[r].keys.emplace(p, k_map);
    }
  }

  const QueryBlock* block() const { return block_; }
  int64_t rows() const { return rows_; }                // per head of k: tokens times group
  int64_t block_m() const { return block_m_; }          // rows that read a block of keys together
  int64_t padded_rows() const { return padded_rows_; }  // a multiple of block_m
  int64_t stride() const { return stride_; }            // floats per row
  int64_t first_position() const { return position(0); }
  int64_t last_position() const { return position(tokens_ - 1); }
  int64_t position_of(int64_t row) const { return position(row / group_); }

  // Returns row `row` of a head of k, rotated for region r.
  const float* row(int64_t r, int64_t head, int64_t row) const {
    return &regions_[r].q[(head * padded_rows_ + row) * stride_];
  }

  // Returns the rotation of region r's keys; nullptr if stored keys need none.
  KeyRotation* key_rotation(int64_t r) { return regions_[r].keys ? &*regions_[r].keys : nullptr; }

  // Loads the queries of a block.
  void start(const QueryBlock* block) {
    block_ = block;
    tokens_ = block->last_token - block->first_token;
    rows_ = tokens_ * group_;
    block_m_ = rows_ <= 2 ? rows_ : kMaxBlockM;
    padded_rows_ = round_up(rows_, block_m_);
    inv_freq_ = p_.freqs.inv_freq + block->sequence * p_.freqs.batch;
    for (RegionQueries& region : regions_) region.ready = false;
    load();
  }

  // Rotates queries for the regions of these keys, unless earlier keys were in them.
  void rotate(int64_t begin, int64_t end) {
    for (int64_t r = 0; r < p_.regions.count; ++r) {
      RegionQueries& region = regions_[r];
      const bool sees = p_.regions.start(r, first_position()) < end &&
                        begin < p_.regions.start(r + 1, last_position());
      if (!sees || region.ready) continue;
      region.ready = true;
      region.q.assign(scaled_.size(), 0.0f);
      if (!region.keys || region.keys->is_of_pairs()) rotate_to(r, 0.0);
    }
  }

  // If r's keys rotate on: prepares their angles, and rotates the queries again, both from key's
  // angle on. If pairs have their own maps, the queries stay.
  void start_keys(int64_t r, int64_t key, int64_t count) {
    KeyRotation* rotation = key_rotation(r);
    if (!rotation) return;
    const double origin = rotation->start_block(inv_freq_, key, count);
    if (!rotation->is_of_pairs()) rotate_to(r, origin);
  }

 private:
  // The queries rotated for a region, and the rotation of its keys if they need one.
  struct RegionQueries {
    Buffer<float> q;
    std::optional<KeyRotation> keys;
    bool ready = false;  // q is rotated, or allocated to be rotated with each block of keys
  };

  int64_t position(int64_t token) const { return block_->first_position + token; }

  // Returns the offset of a token and q head's row in scaled_ and the regions' q.
  int64_t offset(int64_t token, int64_t head) const {
    return (head / group_ * padded_rows_ + token * group_ + head % group_) * stride_;
  }

  void load() {
    scaled_.assign(p_.cache.heads * padded_rows_ * stride_, 0.0f);
    for (int64_t token = 0; token < tokens_; ++token) {
      const float scale = logit_scale(token);
      for (int64_t head = 0; head < p_.heads_q; ++head) {
        const T* q = static_cast<const T*>(p_.q) + block_->batch * p_.q_stride_batch +
                     (block_->first_token + token) * p_.q_stride_seq + head * p_.q_stride_head;
        float* scaled = &scaled_[offset(token, head)];
        const float factor = p_.cache.is_e4m3() ? scale * p_.cache.k_scale[head / group_] : scale;
        for (int64_t d = 0; d < p_.cache.head_dim; ++d) scaled[d] = widen(q[d]) * factor;
      }
    }
  }

  // Returns the factor of a token's logits, log2(e) included unless they are capped.
  float logit_scale(int64_t token) const {
    double scale = logit_scale_;
    if (p_.query_scale.data) {
      scale *= p_.query_scale.of(block_->batch, block_->first_token + token);
    }
    return static_cast<float>(scale);
  }

  // Rotates the queries of region r to q_map(i) - origin, from where they stand.
  void rotate_to(int64_t r, double origin) {
    const int64_t heads_k = p_.freqs.heads, alike = p_.heads_q / heads_k;
    for (int64_t token = 0; token < tokens_; ++token) {
      for (int64_t head_k = 0, head = 0; head_k < heads_k; ++head_k) {
        fill(r, head_k, position(token), origin);
        for (; head < (head_k + 1) * alike; ++head) {
          const int64_t row = offset(token, head);
          rotate_to_float(rotation_, &scaled_[row], cos_.data(), sin_.data(), 1.0f,
                          &regions_[r].q[row]);
          if (!regions_[r].keys) match_cache(&regions_[r].q[row]);
        }
      }
    }
  }

  // Fills the cosines and sines of a token for region r in one head of k.
  void fill(int64_t r, int64_t head, int64_t position, double origin) {
    const PositionMap& map = p_.regions.at[r].q_map;
    const double* inv_freq = inv_freq_ + head * p_.freqs.head();
    // From where the query stands, and further back by `origin`.
    const double from = p_.regions.q_stored(position) + origin;
    const double to = map.is_of_pairs() ? 1.0 : map(position) - from;
    const Angles angles{
        .position = to, .amplitude = p_.amplitude, .decay = to, .log_decay = p_.freqs.log_decay};
    PairAngles pairs;
    if (map.is_of_pairs()) {
      const PositionMap all_from = PositionMap::constant(from);
      inv_freq = pairs.fill(p_.regions.pair_maps, map, all_from, position, inv_freq);
    }
    fill_sincos(inv_freq, p_.freqs.half, angles, cos_.data(), sin_.data());
  }

  // Converts a query to the order and unit in which load_dims reads keys.
  void match_cache(float* q) const {
    const int64_t head_dim = p_.cache.head_dim;
    if constexpr (kReadInPairs<Cached>) order_by_words(q, head_dim);
    for (int64_t d = 0; kUnit<Cached> != 1 && d < head_dim; ++d) q[d] *= kUnit<Cached>;
  }

  const DecodeParams& p_;
  const RowRotation rotation_;
  const int64_t group_;       // q heads per head of k
  const double logit_scale_;  // of all logits: divided by softcap, or with log2(e)
  const int64_t stride_;
  const QueryBlock* block_ = nullptr;
  int64_t tokens_ = 0, rows_ = 0, padded_rows_ = 0, block_m_ = 1;
  const double* inv_freq_ = nullptr;
  RegionQueries regions_[kMaxRegions];
  Buffer<float> cos_, sin_, scaled_;  // scaled_: queries times the scale of their logits
};

}  // namespace
}  // namespace extrope
