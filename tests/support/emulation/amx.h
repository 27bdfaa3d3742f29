// AMX in software, put before sources of the CPU library with -include: its tile registers are
// memory, its products loops, and the processor says that it has it. So the kernels for AMX run on
// any processor with AVX512_BF16, whose other instructions they use.
#pragma once

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace emulated_amx {

inline int cpuid(unsigned leaf, unsigned subleaf, unsigned* a, unsigned* b, unsigned* c,
                 unsigned* d) {
  const int known = __get_cpuid_count(leaf, subleaf, a, b, c, d);
  if (leaf == 7 && subleaf == 0) *d |= 1u << 22 | 1u << 24;  // AMX-BF16, AMX-TILE
  return known;
}

#if defined(__AMX_TILE__)

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

struct Tiles {
  bool loaded = false;
  alignas(64) uint8_t rows[kTiles][kRows][kRowBytes];
};
static thread_local Tiles tiles;

// What a processor would end the program for, and what the kernels never ask for: small tiles.
static inline void expect(bool condition) {
  if (!condition) std::abort();
}

static inline void configure(const void* shape) {
  uint8_t bytes[64];
  std::memcpy(bytes, shape, sizeof(bytes));
  expect(bytes[0] == 1 && bytes[1] == 0);
  for (int tile = 0; tile < kTiles; ++tile) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, bytes + 16 + 2 * tile, sizeof(row_bytes));
    expect(row_bytes == kRowBytes && bytes[48 + tile] == kRows);
  }
  std::memset(tiles.rows, 0, sizeof(tiles.rows));
  tiles.loaded = true;
}

static inline void release() { tiles.loaded = false; }

static inline void load(int tile, const void* from, int64_t stride) {
  expect(tiles.loaded);
  for (int i = 0; i < kRows; ++i) {
    std::memcpy(tiles.rows[tile][i], static_cast<const char*>(from) + i * stride, kRowBytes);
  }
}

static inline void store(int tile, void* to, int64_t stride) {
  expect(tiles.loaded);
  for (int i = 0; i < kRows; ++i) {
    std::memcpy(static_cast<char*>(to) + i * stride, tiles.rows[tile][i], kRowBytes);
  }
}

static inline void zero(int tile) {
  expect(tiles.loaded);
  std::memset(tiles.rows[tile], 0, sizeof(tiles.rows[tile]));
}

static inline __m512 low(__m512i pairs) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
}
static inline __m512 high(__m512i pairs) {
  return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000)));
}

// sums += a b, a pair after a pair; both of a pair's products are added one by one.
static inline void multiply(int sums, int a, int b) {
  expect(tiles.loaded && sums != a && sums != b && a != b);
  for (int i = 0; i < kRows; ++i) {
    int32_t pairs[16];
    std::memcpy(pairs, tiles.rows[a][i], kRowBytes);
    __m512 row = _mm512_load_ps(tiles.rows[sums][i]);
    for (int k = 0; k < 16; ++k) {
      const __m512i right = _mm512_load_si512(tiles.rows[b][k]);
      const __m512i left = _mm512_set1_epi32(pairs[k]);
      row = _mm512_fmadd_ps(low(left), low(right), row);
      row = _mm512_fmadd_ps(high(left), high(right), row);
    }
    _mm512_store_ps(tiles.rows[sums][i], row);
  }
}

#endif

}  // namespace emulated_amx

#define __get_cpuid_count emulated_amx::cpuid
#define syscall(...) 0L  // Linux lends the tiles

#if defined(__AMX_TILE__)
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig(shape) emulated_amx::configure(shape)
#define _tile_release() emulated_amx::release()
#define _tile_loadd(tile, from, stride) emulated_amx::load(tile, from, stride)
#define _tile_stored(tile, to, stride) emulated_amx::store(tile, to, stride)
#define _tile_zero(tile) emulated_amx::zero(tile)
#define _tile_dpbf16ps(sums, a, b) emulated_amx::multiply(sums, a, b)
#endif
