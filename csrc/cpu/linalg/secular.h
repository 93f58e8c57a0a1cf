// The roots of 1 / rho + sum_i z_i^2 / (pole_i - x) = 0, which are the eigenvalues of diag(poles) + rho z z^T.
#pragma once

#include <cstdint>

namespace curvax {

// A root as a pole and what it lies beyond it, so that its distance from any pole is known to full relative precision.
struct Root {
  double origin, shift;

  double value() const { return origin + shift; }
};

// Root j, between poles j and j + 1, or behind the last of the n poles, for rho > 0 and rising poles. `poles` and
// `squares`, of z, are padded to a multiple of eight with infinities and zeros. The equation is met to `tolerance`
// times the size of its terms.
Root SecularRoot(const double* poles, const double* squares, int64_t n, int64_t j, double rho, double tolerance);

}  // namespace curvax
