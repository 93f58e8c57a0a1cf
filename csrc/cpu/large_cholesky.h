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
// Block columns are made from left to right. Each panel is first freed of the products of the block columns before it,
// then the panels on the diagonal are factorized, then the ones below are solved with them: what is on the diagonal is
// made by one thread while the others free the panels below. Which thread does what has no influence on the result.
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
  bool sound_ = false;
};

}  // namespace curvax
