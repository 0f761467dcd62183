// Tiles of AMX: registers of 16 rows of 64 bytes, and the instruction that multiplies two of them.
//
//   sum[i][j] += Σ_p left[i][2p] · right[p][2j] + left[i][2p + 1] · right[p][2j + 1]
//
// 16 × 16 floats, of 16 pairs of bfloat16 along p: `left` holds rows of pairs as they stand, `right` has pairs
// of neighbouring rows interleaved. Products and sums are rounded to nearest, and what is below the normal
// range is taken for zero.
//
// Tiles are named by number and never left to the compiler, which needs no support for them; the assembler must
// know the instructions (binutils 2.35). Only code that the processor and the operating system were asked for
// may use them (cpu.cpp).
#pragma once

#include <cstdint>

#include "simd.h"

namespace wscl {
namespace WSCL_ISA {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTilePairs = 16;                      // of a row of `left`, and rows of `right`
constexpr int64_t kTileSteps = kTileRows * kTilePairs;  // numbers of a tile, be they pairs or floats

// While this lives, this thread's tiles are whole: kTileRows × 64 bytes.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int t = 0; t < 8; ++t) {
      shape.bytes[t] = 64;
      shape.rows[t] = kTileRows;
    }
    asm volatile("ldtilecfg %0" : : "m"(shape));
  }
  ~Tiles() {
    asm volatile("tilerelease");
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

template <int kTile>
WSCL_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}

// Rows that are `stride` bytes apart.
template <int kTile>
WSCL_INLINE void tile_load(const void* rows, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(rows), "r"(stride), "i"(kTile) : "memory");
}

template <int kTile>
WSCL_INLINE void tile_store(void* rows, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(rows), "r"(stride), "i"(kTile) : "memory");
}

template <int kSum, int kLeft, int kRight>
WSCL_INLINE void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kLeft), "i"(kRight));
}

// What the processor can do at most, as multiply_add of the similarity pass.
inline double tile_multiplications(int64_t rounds) {
  const Tiles tiles;
  tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  tile_zero<4>(), tile_zero<5>(), tile_zero<6>(), tile_zero<7>();
  for (int64_t i = 0; i < rounds; ++i) {
    tile_multiply<0, 4, 6>();
    tile_multiply<1, 4, 7>();
    tile_multiply<2, 5, 6>();
    tile_multiply<3, 5, 7>();
  }
  return 4.0 * rounds * 4 * kTileSteps * kTileRows;
}

}  // namespace WSCL_ISA
}  // namespace wscl
