#include "cpu/large_cholesky.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "common/batched_cg.h"
#include "common/leaves.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace curvax {
namespace {

// Rows of the matrix that a thread multiplies at a time.
constexpr int64_t kRowRun = 64;
// inverse, least, b, x, r
constexpr int64_t kVectors = 5;

template <typename T>
double Dot(const T* a, const T* b, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; i += kBlock) sum += Kernels<T>().dot(a + i, b + i, std::min(kBlock, n - i));
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
LargeCholesky<T>::LargeCholesky(xla::ffi::ThreadPool& pool, int64_t threads, int64_t n)
    : pool_(pool),
      kernels_(KernelsOfPanels<T>()),
      threads_(threads),
      n_(n),
      width_(kernels_.panel),
      panels_((n + width_ - 1) / width_),
      block_(std::max<int64_t>(1, kBlockRows / width_)),
      factor_(width_ * width_ * panels_ * (panels_ + 1) / 2),
      vectors_(kVectors * panels_ * width_),
      inverse_(vectors_.data()),
      least_(inverse_ + panels_ * width_) {}

// The matrix is symmetric: entries of a panel's rows stand side by side in the rows above. Behind the last row and
// column stands the identity.
template <typename T>
void LargeCholesky<T>::Pack(int64_t panel) {
  const int64_t first = panel * width_, end = first + width_;
  const int64_t kept = std::min(n_, end) - first;
  T* to = Rows(panel);
  for (int64_t k = 0; k < end; ++k, to += width_) {
    const int64_t copied = k < n_ ? kept : 0;
    if (copied > 0) std::memcpy(to, matrix_ + k * stride_ + first, copied * sizeof(T));
    std::fill(to + copied, to + width_, T(0));
    if (k < first) continue;
    T& diagonal = to[k - first];
    diagonal = k < n_ ? diagonal + damping_ : T(1);
    least_[k] = k < n_ ? static_cast<T>(n_) * Precision<T>::eps * diagonal : T(0);
  }
}

// Columns [begin, end) of a panel less the products of its entries before `begin`.
template <typename T>
void LargeCholesky<T>::Free(int64_t panel, int64_t begin, int64_t end) {
  T* rows = Rows(panel);
  for (int64_t k = 0; k < begin; k += kDepth) {
    const int64_t depth = std::min(kDepth, begin - k);
    for (int64_t column = begin; column < end; column += kernels_.strip) {
      const int64_t other = column / width_;
      const T* left = Rows(other) + k * width_ + (column - other * width_);
      kernels_.subtract(left, rows + k * width_, depth, rows + column * width_);
    }
  }
}

// Columns [begin, end) of a panel, solved with the rows of the panels on the diagonal; products count from `from` on.
template <typename T>
void LargeCholesky<T>::SolveColumns(int64_t panel, int64_t from, int64_t begin, int64_t end) {
  T* rows = Rows(panel);
  for (int64_t column = begin; column < end; column += kernels_.strip) {
    const int64_t other = column / width_, offset = column - other * width_;
    const T* left = Rows(other) + from * width_ + offset;
    const T* triangle = Rows(other) + column * width_ + offset;
    kernels_.subtract_and_solve(left, rows + from * width_, column - from, triangle, inverse_ + column,
                                rows + column * width_);
  }
}

// The panels [begin, end), whose own rows are one block on the diagonal.
template <typename T>
bool LargeCholesky<T>::FactoriseDiagonal(int64_t begin, int64_t end) {
  const int64_t from = begin * width_;
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t first = panel * width_;
    Free(panel, from, first + width_);
    SolveColumns(panel, from, from, first);
    for (int64_t column = first; column < first + width_; column += kernels_.strip)
      if (!kernels_.factorise(Rows(panel), first, from, column, least_, inverse_)) return false;
  }
  return true;
}

template <typename T>
void LargeCholesky<T>::Factorise(const T* matrix, int64_t stride, T damping) {
  matrix_ = matrix;
  stride_ = stride;
  damping_ = damping;
  sound_ = true;
  ParallelFor(pool_, threads_, panels_, [&](int64_t panel) { Pack(panels_ - 1 - panel); });
  for (int64_t begin = 0; begin < panels_ && sound_; begin += block_) {
    const int64_t end = std::min(panels_, begin + block_);
    const int64_t from = begin * width_, to = end * width_;
    bool sound = true;  // written by piece 0 alone
    ParallelFor(pool_, threads_, 1 + (begin > 0 ? panels_ - end : 0), [&](int64_t piece) {
      if (piece == 0)
        sound = FactoriseDiagonal(begin, end);
      else
        Free(end + piece - 1, from, to);
    });
    sound_ = sound;
    if (sound_)
      ParallelFor(pool_, threads_, panels_ - end, [&](int64_t piece) { SolveColumns(end + piece, from, from, to); });
  }
}

// y = (L L^T)^-1 y.
template <typename T>
void LargeCholesky<T>::Substitute(T* y) const {
  for (int64_t panel = 0; panel < panels_; ++panel) kernels_.forward(Rows(panel), panel * width_, inverse_, y);
  for (int64_t panel = panels_ - 1; panel >= 0; --panel) kernels_.backward(Rows(panel), panel * width_, inverse_, y);
}

// r = b - (A + damping I) x, each entry rounded once from double.
template <typename T>
void LargeCholesky<T>::Residual(const T* b, const T* x, T* r) const {
  ParallelFor(pool_, threads_, (n_ + kRowRun - 1) / kRowRun, [&](int64_t run) {
    for (int64_t i = run * kRowRun; i < std::min(n_, (run + 1) * kRowRun); ++i) {
      const double product = Dot(matrix_ + i * stride_, x, n_) + static_cast<double>(damping_) * x[i];
      r[i] = static_cast<T>(b[i] - product);
    }
  });
  std::fill(r + n_, r + panels_ * width_, T(0));
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
  const int64_t padded = panels_ * width_;
  T *b = least_ + padded, *x = b + padded, *r = x + padded;
  const T size = UnitRhs(rhs, n_, padded, b), nan = std::numeric_limits<T>::quiet_NaN();
  if (!sound_ || !IsFinite(size)) {
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
