#include "cpu/linalg/tridiagonal.h"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "cpu/linalg/packed.h"
#include "cpu/linalg/reflectors.h"

namespace curvax {
namespace {

// Reflectors between two updates of the leading part.
constexpr int64_t kBlock = 32;
// Rows of a piece of a product with the leading part, and the rows from which pieces are worth other threads.
constexpr int64_t kPieces = 8;
constexpr int64_t kParallelRows = 1536;

// Turns between two tries of the slower way.
constexpr int64_t kTurns = 8;

}  // namespace

bool Pace::Share() {
  if (seconds_[0] == 0 || seconds_[1] == 0) return seconds_[1] == 0;
  const bool faster = seconds_[1] < seconds_[0];
  return ++turns_ % kTurns == 0 ? !faster : faster;
}

template <typename T>
Tridiagonal<T>::Tridiagonal(const Workers& workers, int64_t n)
    : workers_(workers),
      n_(n),
      stride_(Padded<T>(n) + kWideEntries<T>),
      rows_(n * stride_),
      left_(kBlock * stride_),
      right_(kBlock * stride_),
      parts_(n >= kParallelRows ? kPieces * stride_ : 0),
      diagonal_(n),
      beside_(n),
      tau_(n) {}

template <typename T>
void Tridiagonal<T>::Reduce(const T* matrix, int64_t stride, T factor) {
  for (int64_t i = 0; i < n_; ++i) {
    T* const row = Row(i);
    for (int64_t j = 0; j <= i; ++j) row[j] = factor * matrix[i * stride + j];
    std::fill(row + i + 1, row + stride_, T(0));
  }
  for (int64_t end = n_; end > 0; end -= std::min(kBlock, end)) {
    const int64_t begin = end - std::min(kBlock, end);
    share_ = end >= kParallelRows && workers_.threads > 1 && pace_.Share();
    product_seconds_ = 0;
    ReduceRows(begin, end);
    if (end >= kParallelRows) pace_.Took(share_, product_seconds_ / (static_cast<double>(end) * end));
    // 4.
    UpdateLeading(begin, end - begin);
  }
}

template <typename T>
void Tridiagonal<T>::ReduceRows(int64_t begin, int64_t end) {
  const FactorizationKernels<T>& loops = Kernels<T>().factorizations;
  for (int64_t i = end - 1; i >= begin; --i) {
    const int64_t done = end - 1 - i;
    T *const v = left_.data() + done * stride_, *const w = right_.data() + done * stride_;
    // 1. and 2.
    UpdateRow(i, done);
    MakeReflectorOf(i);
    const int64_t whole = Padded<T>(i);
    std::copy_n(Row(i), stride_, v);
    // 3. w = A v.
    SymmetricProduct(i, v, w);
    // w = tau (A v) less what the reflectors of this block subtract from A, and a multiple of v.
    T of_v[kBlock], of_w[kBlock];
    loops.dots(left_.data(), stride_, done, whole, v, of_v);
    loops.dots(right_.data(), stride_, done, whole, v, of_w);
    for (int64_t k = 0; k < done; ++k) {
      of_v[k] = -of_v[k];
      of_w[k] = -of_w[k];
    }
    loops.add_rows(left_.data(), stride_, done, whole, of_w, w);
    loops.add_rows(right_.data(), stride_, done, whole, of_v, w);
    loops.scale(tau_[i], w, whole, w);
    T overlap;
    loops.dots(w, stride_, 1, whole, v, &overlap);
    const T share = -tau_[i] * overlap / 2;
    loops.add_rows(v, stride_, 1, whole, &share, w);
    // Beyond its entries w gathered what other rows have there.
    std::fill(w + i, w + stride_, T(0));
  }
}

// Row i less what the `done` reflectors of this block take from it.
template <typename T>
void Tridiagonal<T>::UpdateRow(int64_t i, int64_t done) {
  if (done == 0) return;
  T *const row = Row(i), of_v[kBlock], of_w[kBlock];
  for (int64_t k = 0; k < done; ++k) {
    of_v[k] = -left_.data()[k * stride_ + i];
    of_w[k] = -right_.data()[k * stride_ + i];
  }
  const int64_t whole = Padded<T>(i + 1);
  Kernels<T>().factorizations.add_rows(left_.data(), stride_, done, whole, of_w, row);
  Kernels<T>().factorizations.add_rows(right_.data(), stride_, done, whole, of_v, row);
  std::fill(row + i + 1, row + whole, T(0));
}

template <typename T>
void Tridiagonal<T>::MakeReflectorOf(int64_t i) {
  T* const row = Row(i);
  diagonal_[i] = row[i];
  row[i] = 0;
  tau_[i] = 0;
  if (i == 0) return;
  const T pivot = row[i - 1];
  row[i - 1] = 0;
  const Reflector<T> reflector = MakeReflector(pivot, Kernels<T>().factorizations.squares(row, Padded<T>(i)));
  tau_[i] = reflector.tau;
  beside_[i - 1] = reflector.beta;
  Kernels<T>().factorizations.scale(reflector.inverse, row, Padded<T>(i), row);
  row[i - 1] = 1;
}

// y = A x with the leading i rows.
template <typename T>
void Tridiagonal<T>::SymmetricProduct(int64_t i, const T* x, T* y) {
  std::fill(y, y + stride_, T(0));
  if (i < kParallelRows) return Kernels<T>().factorizations.symmetric_rows(rows_.data(), stride_, 0, i, x, y);
  const auto begin = std::chrono::steady_clock::now();
  ProductInPieces(i, x, y);
  product_seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

template <typename T>
void Tridiagonal<T>::ProductInPieces(int64_t i, const T* x, T* y) {
  const FactorizationKernels<T>& loops = Kernels<T>().factorizations;
  // Rows as long as the part of the triangle that they close: pieces of equal area.
  const auto row_of = [&](int64_t piece) {
    return static_cast<int64_t>(std::sqrt(static_cast<double>(piece) / kPieces) * i) / 4 * 4;
  };
  const Workers workers = {workers_.pool, share_ ? workers_.threads : 1};
  workers.For(kPieces, [&](int64_t piece) {
    T* const part = parts_.data() + piece * stride_;
    const int64_t end = piece + 1 == kPieces ? i : row_of(piece + 1);
    std::fill(part, part + Padded<T>(end + 4), T(0));
    loops.symmetric_rows(rows_.data(), stride_, row_of(piece), end, x, part);
  });
  const T one = 1;
  for (int64_t piece = 0; piece < kPieces; ++piece) {
    const int64_t end = piece + 1 == kPieces ? i : row_of(piece + 1);
    loops.add_rows(parts_.data() + piece * stride_, stride_, 1, Padded<T>(end), &one, y);
  }
}

// The leading part less V^T W + W^T V.
template <typename T>
void Tridiagonal<T>::UpdateLeading(int64_t begin, int64_t count) {
  if (begin == 0) return;
  Packed<T> left(begin, 2 * count), right(begin, 2 * count);
  const int64_t width = left.width();
  const Workers workers = workers_.Of(begin * begin * count);
  workers.For(left.panels(), [&](int64_t panel) {
    const int64_t first = panel * width, valid = std::min(width, begin - first);
    for (int64_t k = 0; k < count; ++k) {
      const T *const v = left_.data() + k * stride_ + first, *const w = right_.data() + k * stride_ + first;
      T *const of_v = left.At(first, k), *const of_w = left.At(first, count + k);
      for (int64_t r = 0; r < valid; ++r) {
        of_v[r] = -v[r];
        of_w[r] = -w[r];
      }
      std::fill(of_v + valid, of_v + width, T(0));
      std::fill(of_w + valid, of_w + width, T(0));
      std::copy_n(w, valid, right.At(first, k));
      std::copy_n(v, valid, right.At(first, count + k));
      std::fill(right.At(first, k) + valid, right.At(first, k) + width, T(0));
      std::fill(right.At(first, count + k) + valid, right.At(first, count + k) + width, T(0));
    }
  });
  Multiply<T>(workers, left, right, 0, 2 * count, {rows_.data(), stride_, true, true});
  for (int64_t i = 0; i < begin; ++i)
    std::fill(Row(i) + i + 1, Row(i) + std::min(stride_, Padded<T>(i + 4) + 64), T(0));
}

template class Tridiagonal<float>;
template class Tridiagonal<double>;

}  // namespace curvax
