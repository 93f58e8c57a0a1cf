#include "cpu/linalg/triangle.h"

#include <algorithm>

namespace curvax {

template <typename T>
Triangle<T>::Triangle(int64_t n)
    : kernels_(Kernels<T>().panels),
      n_(n),
      width_(kernels_.panel),
      panels_((n + width_ - 1) / width_),
      rows_(width_ * width_ * panels_ * (panels_ + 1) / 2),
      inverse_(panels_ * width_) {}

template <typename T>
void Triangle<T>::Pack(int64_t panel, const T* matrix, int64_t stride, bool reversed) {
  const int64_t first = panel * width_, valid = std::min(width_, n_ - first);
  T* const to = Rows(panel);
  std::fill(to, to + (first + width_) * width_, T(0));
  for (int64_t r = 0; r < valid; ++r)
    for (int64_t k = 0; k <= first + r; ++k)
      to[k * width_ + r] =
          reversed ? matrix[(n_ - 1 - k) * stride + n_ - 1 - first - r] : matrix[(first + r) * stride + k];
  for (int64_t r = valid; r < width_; ++r) to[(first + r) * width_ + r] = 1;
  for (int64_t r = 0; r < width_; ++r) inverse_.data()[first + r] = 1 / to[(first + r) * width_ + r];
}

template <typename T>
void Triangle<T>::Subtract(T* rows, int64_t from, int64_t begin, int64_t end) const {
  for (int64_t k = from; k < begin; k += kDepth) {
    const int64_t depth = std::min(kDepth, begin - k);
    for (int64_t entry = begin; entry < end; entry += kernels_.strip) {
      const int64_t other = entry / width_;
      const T* left = Rows(other) + k * width_ + (entry - other * width_);
      kernels_.subtract(left, rows + k * width_, depth, rows + entry * width_);
    }
  }
}

template <typename T>
void Triangle<T>::SolveEntries(T* rows, int64_t from, int64_t begin, int64_t end) const {
  for (int64_t entry = begin; entry < end; entry += kernels_.strip) {
    const int64_t other = entry / width_, offset = entry - other * width_;
    const T* left = Rows(other) + from * width_ + offset;
    const T* triangle = Rows(other) + entry * width_ + offset;
    kernels_.subtract_and_solve(left, rows + from * width_, entry - from, triangle, inverse() + entry,
                                rows + entry * width_);
  }
}

template <typename T>
void Triangle<T>::SolvePanel(T* rows, int64_t first) const {
  const int64_t block = std::max<int64_t>(1, kBlockRows / width_) * width_;
  first = first / width_ * width_;
  for (int64_t begin = first; begin < padded(); begin += block) {
    const int64_t end = std::min(padded(), begin + block);
    Subtract(rows, first, begin, end);
    SolveEntries(rows, begin, begin, end);
  }
}

template <typename T>
void TriangularSolve(const Workers& workers, const Triangle<T>& triangle, const T* b, int64_t columns, bool reversed,
                     T* x) {
  const int64_t n = triangle.size(), width = triangle.width();
  workers.Of(n * n * columns / 2).For((columns + width - 1) / width, [&](int64_t panel) {
    Scratch<T> memory(triangle.padded() * width);
    T* const rows = memory.data();
    const int64_t column = panel * width, valid = std::min(width, columns - column);
    int64_t first = n;
    for (int64_t k = 0; k < triangle.padded(); ++k) {
      T* const to = rows + k * width;
      std::fill(to, to + width, T(0));
      if (k >= n) continue;
      std::copy_n(b + (reversed ? n - 1 - k : k) * columns + column, valid, to);
      if (first == n && std::any_of(to, to + valid, [](T entry) { return entry != 0; })) first = k;
    }
    if (first < n) triangle.SolvePanel(rows, first);
    for (int64_t k = 0; k < n; ++k)
      std::copy_n(rows + k * width, valid, x + (reversed ? n - 1 - k : k) * columns + column);
  });
}

template class Triangle<float>;
template class Triangle<double>;
template void TriangularSolve<float>(const Workers&, const Triangle<float>&, const float*, int64_t, bool, float*);
template void TriangularSolve<double>(const Workers&, const Triangle<double>&, const double*, int64_t, bool, double*);

}  // namespace curvax
