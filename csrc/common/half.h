// bfloat16 and float16 as bit patterns, to float and back with rounding to the nearest even.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/vector.h"

namespace curvax {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

CURVAX_INLINE uint32_t Bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

CURVAX_INLINE float FromBits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

CURVAX_INLINE void Widen(float value, float& same) { same = value; }
CURVAX_INLINE void Narrow(float value, float& same) { same = value; }
CURVAX_INLINE void Widen(double value, double& same) { same = value; }
CURVAX_INLINE void Narrow(double value, double& same) { same = value; }

CURVAX_INLINE void Widen(BFloat16 half, float& value) { value = FromBits(static_cast<uint32_t>(half.bits) << 16); }

CURVAX_INLINE void Narrow(float value, BFloat16& half) {
  const uint32_t bits = Bits(value);
  // Adding 0x7fff, or one more where the upper part is odd, carries into it exactly when rounding up is due. A NaN
  // could carry over into infinity, so it is made quiet instead.
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  half.bits = static_cast<uint16_t>(nan ? (bits >> 16) | 0x40u : rounded);
}

CURVAX_INLINE void Widen(Float16 half, float& value) {
  const uint32_t sign = static_cast<uint32_t>(half.bits & 0x8000u) << 16;
  const uint32_t rest = half.bits & 0x7fffu;
  // Exponent and mantissa in float's places are 2^112 too small, subnormals included: the product mends that
  // exactly. Infinity and NaN need float's largest exponent.
  const float scaled = FromBits(rest << 13) * 0x1p112f;
  const uint32_t bits = rest >= 0x7c00u ? (rest << 13) | 0x7f800000u : Bits(scaled);
  value = FromBits(sign | bits);
}

CURVAX_INLINE void Narrow(float value, Float16& half) {
  const uint32_t bits = Bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t rest = bits & 0x7fffffffu;
  // Below 2^-14 the result is subnormal: adding 1/2, whose last place is 2^-24, rounds to such multiples.
  const uint32_t subnormal = Bits(FromBits(rest) + 0.5f) - Bits(0.5f);
  const uint32_t normal = (rest - (112u << 23) + 0xfffu + ((rest >> 13) & 1u)) >> 13;
  uint32_t result = rest < (113u << 23) ? subnormal : normal;
  if (rest >= 0x477ff000u) result = 0x7c00u;  // 65520 and above round to infinity
  if (rest > 0x7f800000u) result = 0x7e00u;   // NaN
  half.bits = static_cast<uint16_t>(sign | result);
}

}  // namespace curvax
