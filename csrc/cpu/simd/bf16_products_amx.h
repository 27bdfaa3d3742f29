// Products of bf16 tiles by AMX. A register holds a tile, so parts of a tile cannot be skipped.
#pragma once

#include "cpu/simd/bf16_tiles.h"

namespace extrope {
namespace {

// True if Factors::rows and last_pairs save work.
constexpr bool kSkipsUnusedRows = false;

// Holds this thread's eight tile registers, in full size, until the end of the scope.
class ProductUnit {
 public:
  ProductUnit() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int i = 0; i < 8; ++i) shape.row_bytes[i] = kRowBytes, shape.rows[i] = kSide;
    _tile_loadconfig(&shape);
  }
  ~ProductUnit() { _tile_release(); }
  ProductUnit(const ProductUnit&) = delete;
};

// Adds the product to the sums in registers 0-3: (0, 1) above (2, 3).
EXTROPE_INLINE void multiply_tiles(const Factors& f) {
  const bf16 *a = f.a, *b = f.b;
  for (int64_t k = 0; k < f.depth; ++k) {
    _tile_loadd(4, a, kRowBytes);
    _tile_loadd(6, b, kRowBytes);
    _tile_loadd(7, b + kTileValues, kRowBytes);
    _tile_loadd(5, a + f.a_next, kRowBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    a += f.a_step;
    b += f.b_step;
  }
}

EXTROPE_INLINE void store_sums(const SumsAt& to) {
  _tile_stored(0, to.at, to.row * 4);
  _tile_stored(1, to.at + to.beside, to.row * 4);
  _tile_stored(2, to.at + to.below, to.row * 4);
  _tile_stored(3, to.at + to.below + to.beside, to.row * 4);
}

EXTROPE_INLINE void product_of_tiles(const Factors& f, const SumsAt& to) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  multiply_tiles(f);
  store_sums(to);
}

EXTROPE_INLINE void add_product_of_tiles(const Factors& f, const SumsAt& to) {
  _tile_loadd(0, to.at, to.row * 4);
  _tile_loadd(1, to.at + to.beside, to.row * 4);
  _tile_loadd(2, to.at + to.below, to.row * 4);
  _tile_loadd(3, to.at + to.below + to.beside, to.row * 4);
  multiply_tiles(f);
  store_sums(to);
}

}  // namespace
}  // namespace extrope
