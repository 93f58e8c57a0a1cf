#include "cpu/large_cholesky.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "common/batched_cg.h"
#include "common/leaves.h"
#include "cpu/simd/kernels.h"

namespace curvax {
namespace {

// Rows of the matrix that a thread multiplies at a time.
constexpr int64_t kRowRun = 64;
// least, b, x, r
constexpr int64_t kVectors = 4;

template <typename T>
double Dot(const T* a, const T* b, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; i += kBlock) sum += Kernels<T>().tree_cg.dot(a + i, b + i, std::min(kBlock, n - i));
  return sum;
}

// b = rhs / |rhs|, zeros behind it; gives |rhs|.
template <typename T>
T UnitRhs(const T* rhs, int64_t n, int64_t padded, T* b) {
  T largest = 0, size, unit;
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, std::abs(rhs[i]));  // NaN goes unnoticed, here
  const T safe = largest > 0 && IsFinite(largest) ? largest : T(1);
  for (int64_t i = 0; i < n; ++i) b[i] = rhs[i] / safe;
  UnitScale<T>(largest, static_cast<T>(Dot(b, b, n)), size, unit);
  for (int64_t i = 0; i < n; ++i) b[i] = rhs[i] * unit;
  std::fill(b + n, b + padded, T(0));
  return size;
}

}  // namespace

template <typename T>
LargeCholesky<T>::LargeCholesky(const Workers& workers, int64_t n)
    : workers_(workers),
      kernels_(Kernels<T>().panels),
      n_(n),
      block_(std::max<int64_t>(1, kBlockRows / kernels_.panel)),
      factor_(n),
      vectors_(kVectors * factor_.padded()),
      least_(vectors_.data()) {}

// The matrix is symmetric: entries of a panel's rows stand side by side in the rows above.
template <typename T>
void LargeCholesky<T>::Pack(int64_t panel) {
  const int64_t width = factor_.width(), first = panel * width, end = first + width;
  const int64_t valid = std::min(n_, end) - first;
  T* to = factor_.Rows(panel);
  for (int64_t k = 0; k < end; ++k, to += width) {
    const int64_t copied = k < n_ ? valid : 0;
    if (copied > 0) std::memcpy(to, matrix_ + k * stride_ + first, copied * sizeof(T));
    std::fill(to + copied, to + width, T(0));
    if (k < first) continue;
    T& diagonal = to[k - first];
    diagonal = k < n_ ? diagonal + damping_ : T(1);
    least_[k] = k < n_ ? rounding_ * diagonal : T(0);
  }
}

// The panels [begin, end), whose own rows are one block on the diagonal.
template <typename T>
bool LargeCholesky<T>::FactorizeDiagonal(int64_t begin, int64_t end) {
  const int64_t width = factor_.width(), from = begin * width;
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t first = panel * width;
    T* const rows = factor_.Rows(panel);
    factor_.Subtract(rows, 0, from, first + width);
    factor_.SolveEntries(rows, from, from, first);
    for (int64_t column = first; column < first + width; column += kernels_.strip)
      if (!kernels_.factorize(rows, first, from, column, least_, factor_.inverse())) return false;
  }
  return true;
}

template <typename T>
void LargeCholesky<T>::Factorize(const T* matrix, int64_t stride, T damping, T rounding) {
  matrix_ = matrix;
  stride_ = stride;
  damping_ = damping;
  rounding_ = rounding;
  factorized_ = true;
  const int64_t panels = factor_.panels();
  workers_.For(panels, [&](int64_t panel) { Pack(panels - 1 - panel); });
  for (int64_t begin = 0; begin < panels && factorized_; begin += block_) {
    const int64_t end = std::min(panels, begin + block_);
    const int64_t from = begin * factor_.width(), to = end * factor_.width();
    bool factorized = true;  // written by piece 0 alone
    // 1. and 2.
    workers_.For(1 + (begin > 0 ? panels - end : 0), [&](int64_t piece) {
      if (piece == 0)
        factorized = FactorizeDiagonal(begin, end);
      else
        factor_.Subtract(factor_.Rows(end + piece - 1), 0, from, to);
    });
    factorized_ = factorized;
    // 3.
    if (factorized_)
      workers_.For(panels - end,
                   [&](int64_t piece) { factor_.SolveEntries(factor_.Rows(end + piece), from, from, to); });
  }
}

template <typename T>
int LargeCholesky<T>::WriteFactor(T* factor) const {
  if (!factorized_) {
    std::fill_n(factor, n_ * n_, std::numeric_limits<T>::quiet_NaN());
    return MatrixIsFinite() ? kNotPositiveDefinite : kNonFinite;
  }
  const int64_t width = factor_.width();
  workers_.For(factor_.panels(), [&](int64_t panel) {
    const T* const rows = factor_.Rows(panel);
    for (int64_t i = panel * width; i < std::min(n_, (panel + 1) * width); ++i) {
      for (int64_t k = 0; k <= i; ++k) factor[i * n_ + k] = rows[k * width + i - panel * width];
      std::fill(factor + i * n_ + i + 1, factor + (i + 1) * n_, T(0));
    }
  });
  return kConverged;
}

// y = (L L^T)^-1 y.
template <typename T>
void LargeCholesky<T>::Substitute(T* y) const {
  const int64_t width = factor_.width(), panels = factor_.panels();
  for (int64_t panel = 0; panel < panels; ++panel)
    kernels_.forward(factor_.Rows(panel), panel * width, factor_.inverse(), y);
  for (int64_t panel = panels - 1; panel >= 0; --panel)
    kernels_.backward(factor_.Rows(panel), panel * width, factor_.inverse(), y);
}

// r = b - (A + damping I) x, each entry rounded once from double.
template <typename T>
void LargeCholesky<T>::Residual(const T* b, const T* x, T* r) const {
  workers_.For((n_ + kRowRun - 1) / kRowRun, [&](int64_t run) {
    for (int64_t i = run * kRowRun; i < std::min(n_, (run + 1) * kRowRun); ++i) {
      const double product = Dot(matrix_ + i * stride_, x, n_) + static_cast<double>(damping_) * x[i];
      r[i] = static_cast<T>(b[i] - product);
    }
  });
  std::fill(r + n_, r + factor_.padded(), T(0));
}

template <typename T>
bool LargeCholesky<T>::MatrixIsFinite() const {
  T sum = 0;
  for (int64_t i = 0; i < n_; ++i)
    for (int64_t j = 0; j < n_; ++j) sum += matrix_[i * stride_ + j] * 0;
  return IsFinite(sum + damping_ * 0);
}

template <typename T>
CholeskyEnd<T> LargeCholesky<T>::Solve(const T* rhs, T* value) {
  const int64_t padded = factor_.padded();
  T *b = least_ + padded, *x = b + padded, *r = x + padded;
  const T size = UnitRhs(rhs, n_, padded, b), nan = std::numeric_limits<T>::quiet_NaN();
  if (!factorized_ || !IsFinite(size)) {
    std::fill_n(value, n_, nan);
    return {IsFinite(size) && MatrixIsFinite() ? kNotPositiveDefinite : kNonFinite, nan};
  }
  std::copy_n(b, padded, x);
  Substitute(x);
  Residual(b, x, r);
  Substitute(r);
  for (int64_t i = 0; i < n_; ++i) x[i] += r[i];
  Residual(b, x, r);
  const T residual = static_cast<T>(std::sqrt(Dot(r, r, n_)));
  const bool finite = IsFinite(residual);
  for (int64_t i = 0; i < n_; ++i) value[i] = finite ? x[i] * size : nan;
  if (!finite) return {kNonFinite, nan};
  return {kConverged, size == 0 ? T(0) : residual};
}

template class LargeCholesky<float>;
template class LargeCholesky<double>;

}  // namespace curvax
