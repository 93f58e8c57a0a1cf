// Eigenvalues and eigenvectors of symmetric matrices.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/linalg/divide.h"
#include "cpu/linalg/reflectors.h"
#include "cpu/linalg/tridiagonal.h"
#include "cpu/linalg/workers.h"

namespace curvax {

// A = Q T Q^T with T tridiagonal, T = Z D Z^T by divide and conquer, and the eigenvectors Q Z by blocks of reflectors.
// Everything but the first step is matrix products, shared among the workers.
template <typename T>
class Eigh {
 public:
  Eigh(const Workers& workers, int64_t n);

  // Takes the lower triangle. `values` rise; column j of `vectors` belongs to the j-th. NaN, and a Result other than
  // kConverged, where the matrix holds NaN or infinity or the iteration does not converge.
  int Solve(const T* matrix, T* values, T* vectors);

 private:
  void BackTransform(T* vectors) const;

  const Workers& workers_;
  const int64_t n_;
  Tridiagonal<T> tridiagonal_;
  DivideAndConquer<T> divide_;
  std::vector<std::unique_ptr<ReflectorBlock<T>>> blocks_;
};

}  // namespace curvax
