// Powers of two that bring numbers to size one: multiplying by one loses nothing.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/batched_cg.h"

namespace curvax {

// The factor for a largest magnitude, as near to one over it as normal numbers are, 1 for none. `rest` is the sum of
// entry * 0: not zero where one of them is not finite, and then the factor is NaN.
template <typename T>
T UnitFactor(T largest, T rest) {
  if (!IsFinite(rest)) return std::numeric_limits<T>::quiet_NaN();
  constexpr int most = std::numeric_limits<T>::max_exponent - 3;
  int exponent = 0;
  (void)std::frexp(largest, &exponent);
  return std::ldexp(T(1), -std::clamp(exponent, -most, most));
}

}  // namespace curvax
