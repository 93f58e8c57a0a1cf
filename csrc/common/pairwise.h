// Summation whose rounding error grows with the logarithm of the number of terms.
#pragma once

#include <cstdint>

namespace curvax {

// Sums n terms by halves. The order of additions depends on n alone.
template <typename T>
double PairwiseSum(const T* terms, int64_t n) {
  if (n <= 8) {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(terms[i]);
    return sum;
  }
  const int64_t half = n / 2;
  return PairwiseSum(terms, half) + PairwiseSum(terms + half, n - half);
}

}  // namespace curvax
