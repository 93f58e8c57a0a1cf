#include "cpu/linalg/eigh.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/result.h"
#include "cpu/linalg/unit_factor.h"
#include "cpu/simd/kernels.h"

namespace curvax {
namespace {

// What brings the lower triangle to size one.
template <typename T>
T FactorOf(const T* matrix, int64_t n) {
  T largest = 0, rest = 0;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j <= i; ++j) {
      const T entry = std::abs(matrix[i * n + j]);
      largest = std::max(largest, entry);
      rest += entry * 0;
    }
  return UnitFactor(largest, rest);
}

}  // namespace

template <typename T>
Eigh<T>::Eigh(const Workers& workers, int64_t n)
    : workers_(workers), n_(n), tridiagonal_(workers, n), divide_(workers, n) {
  for (int64_t begin = 0; begin < n; begin += kReflectors)
    blocks_.push_back(std::make_unique<ReflectorBlock<T>>(kReflectors, std::min(n, begin + kReflectors)));
}

template <typename T>
int Eigh<T>::Solve(const T* matrix, T* values, T* vectors) {
  const T factor = FactorOf(matrix, n_);
  int result = IsFinite(factor) ? kConverged : kNonFinite;
  if (result == kConverged) {
    // 1. A = Q T Q^T, with entries of size one.
    tridiagonal_.Reduce(matrix, n_, factor);
    // 2. T = Z D Z^T.
    if (!divide_.Solve(tridiagonal_.diagonal(), tridiagonal_.beside())) result = kMaxIterations;
  }
  if (result != kConverged) {
    std::fill_n(values, n_, std::numeric_limits<T>::quiet_NaN());
    std::fill_n(vectors, n_ * n_, std::numeric_limits<T>::quiet_NaN());
    return result;
  }
  for (int64_t j = 0; j < n_; ++j) values[j] = static_cast<T>(divide_.value(j) / factor);
  // 3. Q Z.
  BackTransform(vectors);
  return kConverged;
}

// Vectors in panels, each of which one thread takes through all blocks while it is in its cache.
template <typename T>
void Eigh<T>::BackTransform(T* vectors) const {
  const int64_t width = Kernels<T>().panels.panel, length = Padded<T>(n_);
  const Workers workers = workers_.Of(n_ * n_ * n_);
  workers.For(blocks_.size(), [&](int64_t block) {
    const int64_t begin = block * kReflectors, end = std::min(n_, begin + kReflectors);
    blocks_[block]->Set(tridiagonal_.reflectors() + begin * tridiagonal_.stride(), tridiagonal_.stride(), end - begin,
                        end, tridiagonal_.tau() + begin);
  });
  workers.For((n_ + width - 1) / width, [&](int64_t panel) {
    const int64_t first = panel * width, valid = std::min(width, n_ - first);
    Scratch<T> columns(length * width), scratch(2 * kReflectors * width);
    T* const x = columns.data();
    std::fill(x, x + length * width, T(0));
    for (int64_t r = 0; r < valid; ++r) {
      const T* const vector = divide_.vector(first + r);
      for (int64_t k = 0; k < n_; ++k) x[k * width + r] = vector[k];
    }
    for (const auto& block : blocks_) block->Apply(x, false, scratch.data());
    for (int64_t k = 0; k < n_; ++k) std::copy_n(x + k * width, valid, vectors + k * n_ + first);
  });
}

template class Eigh<float>;
template class Eigh<double>;

}  // namespace curvax
