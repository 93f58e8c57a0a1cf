// Eigenvalues and eigenvectors of a small symmetric tridiagonal matrix by the implicit QL method (Dubrulle, Martin and
// Wilkinson 1968).
#pragma once

#include <cstdint>

namespace curvax {

// `diagonal` becomes the n eigenvalues, in no order; `beside`, n - 1 entries, is overwritten. Row i of `vectors`, whose
// rows of `length` entries (a multiple of kWideEntries) are `stride` apart, becomes eigenvector i of Q T Q^T, where the
// rows were those of Q^T. False if it does not converge.
template <typename T>
bool QlEigen(int64_t n, double* diagonal, double* beside, T* vectors, int64_t stride, int64_t length);

}  // namespace curvax
