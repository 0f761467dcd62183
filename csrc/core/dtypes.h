// The dtypes of rows, and what is computed with for each: halves are widened to float where they are read.
#pragma once

#include <cstdint>
#include <cstring>

namespace wscl {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
// What is computed with in float, where the same code serves all of it and is told which it is at run time: a
// byte of one.
struct AnyFloat {
  char byte;
};
enum class FloatKind { kFloat, kBFloat16, kFloat16 };

template <class In>
struct ComputeOf {
  using Type = In;
};
template <>
struct ComputeOf<BFloat16> {
  using Type = float;
};
template <>
struct ComputeOf<Float16> {
  using Type = float;
};
template <>
struct ComputeOf<AnyFloat> {
  using Type = float;
};
template <class In>
using Compute = typename ComputeOf<In>::Type;

inline float to_compute(float x) {
  return x;
}
inline double to_compute(double x) {
  return x;
}
inline float to_compute(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline float to_compute(Float16 x) {
  // The exponent is moved by a multiplication, which brings subnormal numbers to where they belong.
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  float value;
  std::memcpy(&value, &magnitude, sizeof value);
  value *= 5.192296858534828e+33f;  // 2^112
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((x.bits & 0x7c00) == 0x7c00) bits = magnitude | 0x7f800000;  // infinity, NaN
  bits |= static_cast<uint32_t>(x.bits & 0x8000) << 16;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// To the nearest, ties to even.
inline void from_compute(float x, float* out) {
  *out = x;
}
inline void from_compute(double x, double* out) {
  *out = x;
}
inline void from_compute(float x, BFloat16* out) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  out->bits = x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void from_compute(float x, Float16* out) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  bits &= 0x7fffffff;
  uint16_t magnitude;
  if (bits >= 0x47800000) {  // 2^16 and above, infinity, NaN
    magnitude = bits > 0x7f800000 ? 0x7e00 : 0x7c00;
  } else if (bits < 0x38800000) {  // below 2^−14: adding ½ puts the last kept bit where float rounds
    float value;
    std::memcpy(&value, &bits, sizeof value);
    value += 0.5f;
    uint32_t rounded;
    std::memcpy(&rounded, &value, sizeof rounded);
    magnitude = static_cast<uint16_t>(rounded - 0x3f000000);
  } else {
    bits += 0xc8000fff + (bits >> 13 & 1);
    magnitude = static_cast<uint16_t>(bits >> 13);
  }
  out->bits = sign | magnitude;
}

}  // namespace wscl
