// One large symmetric positive definite system at a time, factorized in blocks on several threads.
#pragma once

#include <cstdint>

#include "cpu/linalg/triangle.h"
#include "cpu/linalg/workers.h"
#include "cpu/scratch.h"
#include "cpu/simd/kernels.h"
#include "xla/ffi/api/ffi.h"

namespace curvax {

// A + damping I = L L^T, with L in panels as long as the lower triangle: half the matrix.
//
// Block columns of L are made from left to right. For the one between the bars:
//
//   [ l       |     |       ]
//   [ l l     |     |       ]     1. every panel (row) loses the products of the block columns before it,
//   [ l l l   |     |       ]        l l^T: one thread does so on the diagonal, D, and goes on to
//   [ l l l l | D   |       ]     2. the panels on the diagonal, D = L L^T, while the others do so below, B
//   [ l l l l | D D |       ]     3. then all solve the panels below, B = B L^-T
//   [ l l l l | B B | .     ]
//   [ l l l l | B B | . .   ]
//
// Which thread does what has no influence on the result.
template <typename T>
class LargeCholesky {
 public:
  LargeCholesky(const Workers& workers, int64_t n);

  // Takes rows `stride` apart; they must stay until the last Solve. A pivot must be above `rounding` times the entry of
  // the diagonal that it is left of.
  void Factorize(const T* matrix, int64_t stride, T damping, T rounding);

  // Solves, refines once, and says how well. NaN where the factorization failed.
  CholeskyEnd<T> Solve(const T* rhs, T* value);

  // L with zeros above the diagonal, NaN where the factorization failed; how it ended.
  int WriteFactor(T* factor) const;

 private:
  void Pack(int64_t panel);
  bool FactorizeDiagonal(int64_t begin, int64_t end);
  void Substitute(T* y) const;
  void Residual(const T* b, const T* x, T* r) const;
  bool MatrixIsFinite() const;

  const Workers workers_;
  const PanelKernels<T>& kernels_;
  const int64_t n_, block_;
  Triangle<T> factor_;
  Scratch<T> vectors_;
  T* const least_;  // a pivot up to this is rounding
  const T* matrix_ = nullptr;
  int64_t stride_ = 0;
  T damping_ = 0, rounding_ = 0;
  bool factorized_ = false;
};

}  // namespace curvax
