// Eigenvalues and eigenvectors of a symmetric tridiagonal matrix by divide and conquer (Cuppen 1981; Gu and Eisenstat
// 1995).
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/linalg/workers.h"
#include "cpu/scratch.h"
#include "cpu/simd/kernels.h"

namespace curvax {

// The matrix is cut in two: without a matrix of rank one, which is put back afterwards, it has two blocks, each of
// which is solved by itself. With c the entry at the cut, |c| leaves the diagonal on both sides of it:
//
//   d e . .       d  e   .  .
//   e d c .   =   e d-c  .  .    +  c u u^T,  u = (0, 1, 1, 0)       for c > 0; for c < 0 u = (0, 1, -1, 0), |c|
//   . c d e       .  .  d-c e
//   . . e d       .  .   e  d
//
//   1. SolvePart of both halves, down to parts of a few rows, which QL solves (cpu/linalg/ql.h)
//   2. Merge: the eigenpairs of the whole from those of the halves (cpu/linalg/merge.h)
//
// Eigenvectors are rows.
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
