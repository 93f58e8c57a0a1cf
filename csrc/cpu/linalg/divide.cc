#include "cpu/linalg/divide.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "cpu/linalg/merge.h"
#include "cpu/linalg/ql.h"

namespace curvax {
namespace {

// Parts of at most so many rows are solved by QL: measured.
constexpr int64_t kLeaf = 32;

}  // namespace

template <typename T>
DivideAndConquer<T>::DivideAndConquer(const Workers& workers, int64_t n)
    : workers_(workers),
      n_(n),
      stride_(Padded<T>(n) + kWideEntries<T>),
      buffers_{Scratch<T>(n * stride_), Scratch<T>(n > kLeaf ? n * stride_ : 0)},
      order_(n) {
  while (n > kLeaf << depth_) ++depth_;
}

template <typename T>
bool DivideAndConquer<T>::Solve(double* diagonal, double* beside) {
  diagonal_ = diagonal;
  beside_ = beside;
  return n_ == 0 || SolvePart(0, n_, 0);
}

// The part's eigenvectors go to the buffer of its depth: a merge reads one buffer and writes the other.
template <typename T>
bool DivideAndConquer<T>::SolvePart(int64_t begin, int64_t end, int depth) {
  if (depth == depth_) return SolveLeaf(begin, end);
  const int64_t middle = begin + (end - begin) / 2;
  const double cut = beside_[middle - 1];
  diagonal_[middle - 1] -= std::abs(cut);
  diagonal_[middle] -= std::abs(cut);
  // 1. The halves.
  bool solved[2];
  const int64_t size = end - begin;
  workers_.Of(size * size * size).For(2, [&](int64_t half) {
    solved[half] = half == 0 ? SolvePart(begin, middle, depth + 1) : SolvePart(middle, end, depth + 1);
  });
  if (!solved[0] || !solved[1]) return false;
  // 2. The whole.
  const Part<T> part = {begin,
                        middle,
                        end,
                        stride_,
                        diagonal_,
                        order_.data(),
                        buffers_[(depth + 1) % 2].data(),
                        buffers_[depth % 2].data()};
  Merge<T>(workers_, part, cut).Run();
  return true;
}

template <typename T>
bool DivideAndConquer<T>::SolveLeaf(int64_t begin, int64_t end) {
  const int64_t n = end - begin, length = Padded<T>(n);
  alignas(64) T vectors[kLeaf * kLeaf];
  std::fill(vectors, vectors + n * length, T(0));
  for (int64_t i = 0; i < n; ++i) vectors[i * length + i] = 1;
  if (!QlEigen<T>(n, diagonal_ + begin, beside_ + begin, vectors, length, length)) return false;
  T* const to = buffers_[depth_ % 2].data() + begin * stride_ + begin;
  for (int64_t i = 0; i < n; ++i) std::copy_n(vectors + i * length, n, to + i * stride_);
  std::iota(order_.begin() + begin, order_.begin() + end, begin);
  std::sort(order_.begin() + begin, order_.begin() + end,
            [&](int64_t a, int64_t b) { return diagonal_[a] < diagonal_[b]; });
  return true;
}

template class DivideAndConquer<float>;
template class DivideAndConquer<double>;

}  // namespace curvax
