// Eigenvalues and eigenvectors of symmetric matrices, in three steps:
//
//   1. A = Q T Q^T        tridiagonal.h, half of it products with one vector
//
//      a . . .            d e . .
//      a a . .     ->     e d e .
//      a a a .            . e d e
//      a a a a            . . e d
//
//   2. T = Z D Z^T        divide.h, and merge.h, secular.h, ql.h below it
//   3. A = (Q Z) D (Q Z)^T: Z through the reflectors of Q, reflectors.h
//
// For example A = ((2, 1), (1, 2)) is tridiagonal as it is, Q = I, D = (1, 3) and the columns of Z (1, -1) / sqrt(2)
// and (1, 1) / sqrt(2).
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/linalg/divide.h"
#include "cpu/linalg/reflectors.h"
#include "cpu/linalg/tridiagonal.h"
#include "cpu/linalg/workers.h"

namespace curvax {

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
