#include "cpu/linalg/reflectors.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/batched_cg.h"

namespace curvax {
namespace {

int64_t RoundUpTo(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

}  // namespace

template <typename T>
Reflector<T> MakeReflector(T pivot, double others) {
  // Beside numbers of size one, what is so small that squares or inverses leave the range is zero.
  constexpr double least = std::max<double>(std::numeric_limits<T>::min() / Precision<T>::eps, 1e-138);
  if (!(others > least * least)) return {T(0), pivot, T(0)};
  const double alpha = pivot, beta = -std::copysign(std::sqrt(alpha * alpha + others), alpha);
  return {static_cast<T>((beta - alpha) / beta), static_cast<T>(beta), static_cast<T>(1 / (alpha - beta))};
}

template <typename T>
ReflectorBlock<T>::ReflectorBlock(int64_t most, int64_t length)
    : kernels_(Kernels<T>().panels),
      width_(kernels_.panel),
      down_(RoundUpTo(most, width_) * Padded<T>(length)),
      up_(RoundUpTo(Padded<T>(length), width_) * most),
      triangle_(2 * RoundUpTo(most, width_) * most) {}

template <typename T>
void ReflectorBlock<T>::Set(const T* rows, int64_t stride, int64_t count, int64_t length, const T* tau) {
  count_ = count;
  length_ = Padded<T>(length);
  for (int64_t first = 0; first < count; first += width_) {
    T* to = down_.data() + first * length_;
    const int64_t valid = std::min(width_, count - first);
    for (int64_t r = 0; r < valid; ++r)
      for (int64_t k = 0; k < length_; ++k) to[k * width_ + r] = rows[(first + r) * stride + k];
    if (valid < width_)
      for (int64_t k = 0; k < length_; ++k) std::fill(to + k * width_ + valid, to + (k + 1) * width_, T(0));
  }
  for (int64_t first = 0; first < length_; first += width_) {
    T* to = up_.data() + first * count;
    const int64_t valid = std::min(width_, length_ - first);
    for (int64_t r = 0; r < count; ++r, to += width_) {
      std::copy_n(rows + r * stride + first, valid, to);
      std::fill(to + valid, to + width_, T(0));
    }
  }
  SetTriangle(rows, stride, tau);
}

// One reflector more: (I - tau v v^T) (I - V^T M V) has the new row (-tau v V^T M, tau) in M.
template <typename T>
void ReflectorBlock<T>::SetTriangle(const T* rows, int64_t stride, const T* tau) {
  alignas(64) T m[kReflectors * kReflectors];
  alignas(64) T overlaps[kReflectors];
  for (int64_t i = 0; i < count_; ++i) {
    Kernels<T>().factorizations.dots(rows, stride, i, length_, rows + i * stride, overlaps);
    for (int64_t k = 0; k < i; ++k) overlaps[k] *= -tau[i];
    T* const row = m + i * kReflectors;
    std::fill(row, row + kReflectors, T(0));
    Kernels<T>().factorizations.add_rows(m, kReflectors, i, kReflectors, overlaps, row);
    row[i] = tau[i];
  }
  const int64_t size = RoundUpTo(count_, width_) * count_;
  std::fill(triangle_.data(), triangle_.data() + 2 * size, T(0));
  for (int64_t i = 0; i < count_; ++i)
    for (int64_t j = 0; j <= i; ++j) {
      const T entry = m[i * kReflectors + j];
      triangle_.data()[(i / width_ * count_ + j) * width_ + i % width_] = entry;
      triangle_.data()[size + (j / width_ * count_ + i) * width_ + j % width_] = entry;
    }
}

template <typename T>
void ReflectorBlock<T>::Product(const T* packed, int64_t rows, int64_t depth, const T* y, T* sums) const {
  for (int64_t row = 0; row < rows; row += kernels_.strip) {
    const T* left = packed + row / width_ * width_ * depth + row % width_;
    kernels_.product(left, y, depth, sums + row * width_);
  }
}

template <typename T>
void ReflectorBlock<T>::Apply(T* panel, bool reversed, T* scratch) const {
  T *const overlaps = scratch, *const weighted = scratch + kReflectors * width_;
  const T* triangle = triangle_.data() + (reversed ? RoundUpTo(count_, width_) * count_ : 0);
  Product(down_.data(), count_, length_, panel, overlaps);
  Product(triangle, count_, count_, overlaps, weighted);
  for (int64_t k = 0; k < length_; k += kernels_.strip) {
    const T* left = up_.data() + k / width_ * width_ * count_ + k % width_;
    kernels_.subtract(left, weighted, count_, panel + k * width_);
  }
}

template struct Reflector<float>;
template struct Reflector<double>;
template Reflector<float> MakeReflector<float>(float, double);
template Reflector<double> MakeReflector<double>(double, double);
template class ReflectorBlock<float>;
template class ReflectorBlock<double>;

}  // namespace curvax
