// One large symmetric positive definite system at a time, factorised in blocks on several threads.
#pragma once

#include <cstdint>

#include "cpu/batched.h"
#include "cpu/panels.h"
#include "cpu/scratch.h"
#include "xla/ffi/api/ffi.h"

namespace curvax {

// A + damping I = L L^T. L is packed in panels (cpu/panels.h), each as long as the lower triangle: half the matrix.
//
// Block columns are made from left to right. Each panel is first freed of the products of the block columns before it,
// then the panels on the diagonal are factorised, then the ones below are solved with them: what is on the diagonal is
// made by one thread while the others free the panels below. Which thread does what has no influence on the result.
template <typename T>
class LargeCholesky {
 public:
  LargeCholesky(xla::ffi::ThreadPool& pool, int64_t threads, int64_t n);

  // Takes rows `stride` apart; they must stay until the last Solve.
  void Factorise(const T* matrix, int64_t stride, T damping);

  // Solves, refines once, and says how well. NaN where the factorisation failed.
  CholeskyEnd<T> Solve(const T* rhs, T* value);

 private:
  T* Rows(int64_t panel) const { return factor_.data() + width_ * width_ * panel * (panel + 1) / 2; }
  void Pack(int64_t panel);
  void Free(int64_t panel, int64_t begin, int64_t end);
  bool FactoriseDiagonal(int64_t begin, int64_t end);
  void SolveColumns(int64_t panel, int64_t from, int64_t begin, int64_t end);
  void Substitute(T* y) const;
  void Residual(const T* b, const T* x, T* r) const;
  bool MatrixIsFinite() const;

  xla::ffi::ThreadPool& pool_;
  const PanelKernels<T>& kernels_;
  const int64_t threads_, n_, width_, panels_, block_;
  Scratch<T> factor_, vectors_;
  T* const inverse_;  // one over L's diagonal
  T* const least_;    // a pivot up to this is rounding
  const T* matrix_ = nullptr;
  int64_t stride_ = 0;
  T damping_ = 0;
  bool sound_ = false;
};

}  // namespace curvax
