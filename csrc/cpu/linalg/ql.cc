#include "cpu/linalg/ql.h"

#include <cmath>

#include "common/batched_cg.h"
#include "cpu/simd/kernels.h"

namespace curvax {
namespace {

// Steps per eigenvalue; two are usual.
constexpr int kSteps = 30;

// One step on the entries [first, last], with Wilkinson's shift: a rotation chases the entry that it makes beside the
// band from the bottom to the top.
template <typename T>
void Step(int64_t first, int64_t last, double* d, double* e, T* vectors, int64_t stride, int64_t length) {
  double g = (d[first + 1] - d[first]) / (2 * e[first]);
  double r = std::hypot(g, 1.0);
  g = d[last] - d[first] + e[first] / (g + std::copysign(r, g));
  double s = 1, c = 1, p = 0;
  for (int64_t i = last - 1; i >= first; --i) {
    const double f = s * e[i], b = c * e[i];
    r = std::hypot(f, g);
    if (i + 1 < last) e[i + 1] = r;
    if (r == 0) {  // the matrix splits here
      d[i + 1] -= p;
      return;
    }
    s = f / r;
    c = g / r;
    g = d[i + 1] - p;
    r = (d[i] - g) * s + 2 * c * b;
    p = s * r;
    d[i + 1] = g + p;
    g = c * r - b;
    T* const own = vectors + i * stride;
    Kernels<T>().factorizations.rotate(static_cast<T>(c), static_cast<T>(-s), own, own + stride, length);
  }
  d[first] -= p;
  e[first] = g;
}

}  // namespace

template <typename T>
bool QlEigen(int64_t n, double* d, double* e, T* vectors, int64_t stride, int64_t length) {
  for (int64_t first = 0; first < n; ++first) {
    for (int step = 0;; ++step) {
      int64_t last = first;
      while (last + 1 < n && std::abs(e[last]) > Precision<T>::eps * (std::abs(d[last]) + std::abs(d[last + 1])))
        ++last;
      if (last == first) break;
      if (step == kSteps) return false;
      Step(first, last, d, e, vectors, stride, length);
    }
  }
  return true;
}

template bool QlEigen<float>(int64_t, double*, double*, float*, int64_t, int64_t);
template bool QlEigen<double>(int64_t, double*, double*, double*, int64_t, int64_t);

}  // namespace curvax
