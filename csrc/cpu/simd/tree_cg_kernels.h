// The vector work of one conjugate gradient iteration over the leaves of a pytree, on one block of a leaf.
#pragma once

#include <cstdint>

namespace curvax {

// Within a block (common/leaves.h) a lane of the accumulators adds up at most 64 products (float) or 128 (double) in
// the dtype itself; lanes and blocks are added pairwise in double.
template <typename T>
struct TreeCgKernels {
  // xo = x + alpha p, ro = r - alpha (q + lam p); returns <ro, ro>. xo may be x, ro may be r.
  double (*update)(T alpha, T lam, const T* x, const T* p, const T* r, const T* q, T* xo, T* ro, int64_t n);
  // po = z + beta p. po may be p.
  void (*direction)(T beta, const T* z, const T* p, T* po, int64_t n);
  // <a, b>.
  double (*dot)(const T* a, const T* b, int64_t n);
  // <a, b>, <a, a> and <b, b> from one reading of both; each is bit for bit what `dot` gives.
  void (*gram)(const T* a, const T* b, int64_t n, double* products);
};

}  // namespace curvax
