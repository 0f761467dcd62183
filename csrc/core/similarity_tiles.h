// The sizes of one instruction set's register tiles, and what every kernel needs of arithmetic.
#pragma once

#include "simd.h"

namespace wscl {
namespace WSCL_ISA {

constexpr int kRows = WSCL_ROW_TILE;  // of a tile's left side, × kVectors vectors of its right side
constexpr int kVectors = 2;

WSCL_INLINE int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

WSCL_INLINE int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}
WSCL_INLINE int64_t larger(int64_t a, int64_t b) {
  return a > b ? a : b;
}

}  // namespace WSCL_ISA
}  // namespace wscl
