// Eigenvalues and eigenvectors of a symmetric tridiagonal matrix by divide and conquer (Cuppen 1981; Gu and Eisenstat
// 1995).
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/linalg/workers.h"
#include "cpu/scratch.h"
#include "cpu/simd/kernels.h"

namespace curvax {

// The matrix is cut in two by taking a matrix of rank one off, the halves are solved, and the rank is put back
// (cpu/linalg/merge.h). Eigenvectors are rows.
template <typename T>
class DivideAndConquer {
 public:
  DivideAndConquer(const Workers& workers, int64_t n);

  // Overwrites the diagonal and the n - 1 entries beside it. False if a small part does not converge.
  bool Solve(double* diagonal, double* beside);

  // The j-th eigenvalue from below and its eigenvector.
  double value(int64_t j) const { return diagonal_[order_[j]]; }
  const T* vector(int64_t j) const { return buffers_[0].data() + order_[j] * stride_; }

 private:
  bool SolvePart(int64_t begin, int64_t end, int depth);
  bool SolveLeaf(int64_t begin, int64_t end);

  const Workers& workers_;
  const int64_t n_, stride_;
  int depth_ = 0;  // how often the matrix is cut
  Scratch<T> buffers_[2];
  double* diagonal_ = nullptr;
  double* beside_ = nullptr;
  std::vector<int64_t> order_;  // rows by rising eigenvalue, part by part
};

}  // namespace curvax
