// What the forward and the backward of the attention share: how the rows of a tile lie in vectors,
// which keys they see, and the packing of operands.
//
// A lane is one row of one q head. All q heads that share a head of k sit side by side in a tile,
// head fastest, so keys and values are packed once for all of them. Scores are kept transposed, a
// vector of lanes for each key: then maxima and sums over keys need no work across lanes, and the
// rows of k and v can be read as they lie.
#pragma once

#include "cpu/attention/params.h"
#include "cpu/runtime/workspace.h"
#include "cpu/simd/rotate_row.h"
#include "cpu/simd/transpose.h"

namespace extrope {
namespace {

constexpr float kLog2E = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;
constexpr int64_t kMaxHeadDim = 256;

// Tiles of many lanes share what they pack among more of them; but every head should make kTiles at
// least, so that there are some for every thread.
inline int64_t tile_rows(const AttentionParams& p, int64_t lanes) {
  constexpr int64_t kTiles = 8, kLeastLanes = 192;
  const int64_t group = p.heads_q / p.heads_k, least = smaller(kLeastLanes, lanes);
  lanes = smaller(round_up(greater(p.seqlen_q * group / kTiles, least), kPanel), lanes);
  return smaller(greater(lanes / group, 1), greater(p.seqlen_q, 1));
}

// The lanes of one tile, in panels of kPanel; the last panel is padded.
struct TileLanes {
  const AttentionParams& p;
  const QueryTile& tile;
  int64_t heads = p.heads_q / p.heads_k;
  int64_t count = tile.rows * heads;
  int64_t panels = (count + kPanel - 1) / kPanel;

  int64_t row(int64_t lane) const { return tile.row + lane / heads; }
  int64_t head(int64_t lane) const { return tile.head * heads + lane % heads; }
  int64_t position(int64_t lane) const { return row(lane) + tile.seqlen_k - tile.seqlen_q; }
  int64_t offset(const AttentionTensor& x, int64_t lane) const {
    return offset(x, row(lane), head(lane));
  }
  int64_t offset(const AttentionTensor& x, int64_t row, int64_t head) const {
    return tile.batch * x.batch + (tile.token_q + row) * x.seq + head * x.head;
  }
  int64_t statistic(int64_t lane) const {
    return (tile.batch * p.heads_q + head(lane)) * p.seqlen_q + tile.token_q + row(lane);
  }
  float scale(int64_t lane) const {
    return p.softmax_scale * (p.row_scale ? p.row_scale[tile.token_q + row(lane)] : 1.0f);
  }
  // Calls visit(i, row, head) for lane first + i of as many as a vector has, without the divisions
  // above: two for every lane take longer than to copy it.
  template <typename Visit>
  void each_of_vector(int64_t first, const Visit& visit) const {
    int64_t row = this->row(first), head = first % heads;
    for (int64_t i = 0; i < smaller(kFloats, count - first); ++i) {
      visit(i, row, tile.head * heads + head);
      if (++head == heads) head = 0, ++row;
    }
  }
};

// The keys of one region that a panel of lanes sees: [first, last) at all, [full_first, full_last)
// by every lane. Positions rise with the lanes, so both are read off the panel's ends.
struct PanelKeys {
  int64_t first, last, full_first, full_last;
};

inline PanelKeys panel_keys(const TileLanes& lanes, int64_t panel, int64_t region) {
  const int64_t begin = panel * kPanel, end = smaller(begin + kPanel, lanes.count) - 1;
  const int64_t low = lanes.position(begin), high = lanes.position(end);
  return {region_start(lanes.p, region, low), region_start(lanes.p, region + 1, high),
          region_start(lanes.p, region, high), region_start(lanes.p, region + 1, low)};
}

inline PanelKeys tile_keys(const TileLanes& lanes, int64_t region) {
  const int64_t low = lanes.position(0), high = lanes.position(lanes.count - 1);
  return {region_start(lanes.p, region, low), region_start(lanes.p, region + 1, high), 0, 0};
}

// Keys before a step's first one count as blocks of kRows; begin, full_begin, full_end and end are
// such boundaries, relative to the step.
struct PanelBlocks {
  int64_t begin, full_begin, full_end, end;

  bool has_shared() const { return full_begin > begin || end > full_end; }
};

inline PanelBlocks panel_blocks(const PanelKeys& keys, int64_t step_first, int64_t step_keys) {
  const auto inside = [&](int64_t key) { return smaller(greater(key - step_first, 0), step_keys); };
  PanelBlocks b{inside(keys.first) / kRows * kRows, round_up(inside(keys.full_first), kRows),
                inside(keys.full_last) / kRows * kRows, round_up(inside(keys.last), kRows)};
  if (b.full_begin >= b.full_end) b.full_begin = b.full_end = b.end;
  return b;
}

// Per lane: the first key it sees in a region and the first one behind.
struct LaneKeys {
  ints first[kPanelVectors], last[kPanelVectors];
};

inline LaneKeys lane_keys(const TileLanes& lanes, int64_t panel, int64_t region) {
  int32_t first[kPanel] = {}, last[kPanel] = {};
  const int64_t begin = panel * kPanel, count = smaller(kPanel, lanes.count - begin);
  int64_t position = lanes.position(begin), row_end = lanes.heads - begin % lanes.heads;
  for (int64_t i = 0; i < count; ++position, row_end += lanes.heads) {
    const auto from = static_cast<int32_t>(region_start(lanes.p, region, position));
    const auto to = static_cast<int32_t>(region_start(lanes.p, region + 1, position));
    for (; i < smaller(row_end, count); ++i) first[i] = from, last[i] = to;
  }
  LaneKeys keys;
  std::memcpy(keys.first, first, sizeof(first));
  std::memcpy(keys.last, last, sizeof(last));
  return keys;
}

EXTROPE_INLINE void mask_block(Sums<kRows, kPanelVectors>& sums, const LaneKeys& keys,
                               int64_t key) {
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    const ints here = ints{} + static_cast<int32_t>(key + i);
#pragma GCC unroll 16
    for (int j = 0; j < kPanelVectors; ++j) {
      const ints visible = (here >= keys.first[j]) & (here < keys.last[j]);
      sums.at[i][j] = visible ? sums.at[i][j] : floats{} - __builtin_inff();
    }
  }
}

// ----------------------------------------------------------------------------------------------
// Packing

// Cosines and sines of one token; nullptr where rows do not turn.
inline const float* turn_at(const AttentionTurn& turn, int64_t batch, int64_t token) {
  return turn.table ? turn.table + batch * turn.batch + token * turn.seq : nullptr;
}

template <typename T>
inline void read_row(const AttentionParams& p, const T* from, const float* turn, float* to) {
  if (!turn) return widen_row(from, p.head_dim, to);
  turn_row({p.head_dim, p.half, p.interleaved}, from, turn, turn + p.half, 1.0f, to);
}

// The keys of one step in a head of k or v; rows past the last one count as zero.
struct KeyStep {
  int64_t first, count, padded;
};

template <typename T>
inline const T* key_row(const TileLanes& lanes, const AttentionTensor& x, int64_t key) {
  return static_cast<const T*>(x.data) + lanes.tile.batch * x.batch +
         (lanes.tile.token_k + key) * x.seq + lanes.tile.head * x.head;
}

// (padded, head_dim)
template <typename T>
inline void pack_rows(const TileLanes& lanes, const AttentionTensor& x, const AttentionTurn& turn,
                      const KeyStep& step, float* to) {
  const int64_t dim = lanes.p.head_dim;
  for (int64_t i = 0; i < step.count; ++i) {
    const int64_t key = step.first + i;
    read_row(lanes.p, key_row<T>(lanes, x, key),
             turn_at(turn, lanes.tile.batch, lanes.tile.token_k + key), to + i * dim);
  }
  std::memset(to + step.count * dim, 0, (step.padded - step.count) * dim * sizeof(float));
}

// Fetches the share of one panel out of `panels` of the keys first..first+count-1, while the panel
// is at work on those before: rows of one head are too short and too far apart for the processor
// to see where they lead.
template <typename T>
inline void prefetch_share(const TileLanes& lanes, const AttentionTensor& x, int64_t first,
                           int64_t count, int64_t panel) {
  const int64_t begin = count * panel / lanes.panels, end = count * (panel + 1) / lanes.panels;
  for (int64_t i = begin; i < end; ++i) {
    const char* row = reinterpret_cast<const char*>(key_row<T>(lanes, x, first + i));
    const int64_t bytes = lanes.p.head_dim * static_cast<int64_t>(sizeof(T));
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at, 0, 2);
  }
}

// (head_dim / kRows, padded, kRows): the transposed matrix as the left factor of a product. Written
// a cache line at a time: the lines of different d fall into the same set of the cache.
inline void pack_columns(const float* rows, int64_t dim, int64_t padded, float* to) {
  constexpr int64_t kLine = 16 / kRows;  // keys
  for (int64_t i = 0; i < padded; i += kLine) {
    for (int64_t d = 0; d < dim; d += kRows) {
      float* line = to + d * padded + i * kRows;
#pragma GCC unroll 16
      for (int64_t key = 0; key < kLine; ++key) {
        std::memcpy(line + key * kRows, rows + (i + key) * dim + d, kRows * sizeof(float));
      }
    }
  }
}

// A lane that turns is rounded to its type thereafter, as a rotated tensor would be.
template <typename T>
inline void read_lane(const TileLanes& lanes, const AttentionTensor& x, const AttentionTurn& turn,
                      int64_t row, int64_t head, float* to) {
  const float* by = turn_at(turn, lanes.tile.batch, lanes.tile.token_q + row);
  read_row(lanes.p, static_cast<const T*>(x.data) + lanes.offset(x, row, head), by, to);
  if constexpr (sizeof(T) < sizeof(float)) {
    T rounded[kMaxHeadDim];
    if (!by) return;
    narrow_row(to, lanes.p.head_dim, rounded);
    widen_row(rounded, lanes.p.head_dim, to);
  }
}

// The rows of as many lanes as a vector has.
using LaneRows = float[kFloats][kMaxHeadDim + kFloats];

// (panels, head_dim, kPanel), the lanes past the last one zero.
template <typename T>
inline void pack_panels(const TileLanes& lanes, const AttentionTensor& x, const AttentionTurn& turn,
                        const float* scale, float* to) {
  const int64_t dim = lanes.p.head_dim;
  LaneRows rows = {};
  for (int64_t first = 0; first < lanes.panels * kPanel; first += kFloats) {
    if (first + kFloats > lanes.count) std::memset(rows, 0, sizeof(rows));
    lanes.each_of_vector(first, [&](int64_t i, int64_t row, int64_t head) {
      read_lane<T>(lanes, x, turn, row, head, rows[i]);
    });
    float* columns = to + first / kPanel * dim * kPanel + first % kPanel;
    const floats factor = load<floats>(scale + first);
    for (int64_t d = 0; d < dim; d += kFloats) {
      words square[kFloats];
      for (int64_t i = 0; i < kFloats; ++i) square[i] = load<words>(rows[i] + d);
      transpose(square);
      for (int64_t i = 0; i < smaller(kFloats, dim - d); ++i) {
        store(columns + (d + i) * kPanel, bits_as<floats>(square[i]) * factor);
      }
    }
  }
}

// The rows of the lanes from `first` on out of what pack_panels makes.
inline void unpack_lanes(const float* from, int64_t first, int64_t dim, const float* scale,
                         LaneRows& rows) {
  const float* columns = from + first / kPanel * dim * kPanel + first % kPanel;
  const floats factor = load<floats>(scale + first);
  for (int64_t d = 0; d < dim; d += kFloats) {
    words square[kFloats] = {};
    for (int64_t i = 0; i < smaller(kFloats, dim - d); ++i) {
      square[i] = bits_as<words>(load<floats>(columns + (d + i) * kPanel) * factor);
    }
    transpose(square);
    for (int64_t i = 0; i < kFloats; ++i) store(rows[i] + d, square[i]);
  }
}

}  // namespace
}  // namespace extrope
