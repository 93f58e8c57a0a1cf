// A lower triangular matrix L in panels, and solutions of L X = B by blocks.
#pragma once

#include <cstdint>

#include "cpu/linalg/workers.h"
#include "cpu/scratch.h"
#include "cpu/simd/kernels.h"

namespace curvax {

// Panels of rows (cpu/simd/panel_kernels.h), each as long as the lower triangle: half the matrix. Behind the last row
// and column stands the identity. A panel of right-hand sides holds `width` columns of B with entry k of all of them
// side by side, and has padded() entries.
template <typename T>
class Triangle {
 public:
  explicit Triangle(int64_t n);

  int64_t size() const { return n_; }
  int64_t width() const { return width_; }
  int64_t panels() const { return panels_; }
  int64_t padded() const { return panels_ * width_; }
  T* Rows(int64_t panel) const { return rows_.data() + width_ * width_ * panel * (panel + 1) / 2; }
  T* inverse() const { return inverse_.data(); }  // one over the diagonal

  // Takes the lower triangle of a matrix whose rows are `stride` apart; with `reversed` that of the matrix with rows
  // and columns in reverse order, transposed: L^T x = b is that system for x and b in reverse order.
  void Pack(int64_t panel, const T* matrix, int64_t stride, bool reversed);

  // Entries [begin, end) of the panel `rows` less the products of its entries [from, begin).
  void Subtract(T* rows, int64_t from, int64_t begin, int64_t end) const;
  // The same for entries [begin, end) less their products from `from` on, each solved before the next is.
  void SolveEntries(T* rows, int64_t from, int64_t begin, int64_t end) const;
  // L^-1 B for one panel of right-hand sides, whose entries before `first` are zero.
  void SolvePanel(T* rows, int64_t first) const;

 private:
  const PanelKernels<T>& kernels_;
  const int64_t n_, width_, panels_;
  Scratch<T> rows_, inverse_;
};

// X = L^-1 B, or L^-T B, for one L (n, n) and B (n, columns), row by row.
template <typename T>
void TriangularSolve(const Workers& workers, const Triangle<T>& triangle, const T* b, int64_t columns, bool reversed,
                     T* x);

}  // namespace curvax
