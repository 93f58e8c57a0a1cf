// Products of matrices whose operands are packed in panels (cpu/simd/panel_kernels.h).
#pragma once

#include <cstdint>

#include "cpu/linalg/workers.h"
#include "cpu/scratch.h"
#include "cpu/simd/kernels.h"

namespace curvax {

// `rows` vectors of `depth` entries in panels: entry k of all rows of a panel side by side, zeros behind the last row.
template <typename T>
class Packed {
 public:
  Packed(int64_t rows, int64_t depth);

  int64_t rows() const { return rows_; }
  int64_t depth() const { return depth_; }
  int64_t panels() const { return panels_; }
  int64_t width() const { return kernels_.panel; }

  // Entry k of a row, or of the panel that it begins.
  T* At(int64_t row, int64_t k) const {
    const int64_t panel = row / kernels_.panel;
    return memory_.data() + (panel * depth_ + k) * kernels_.panel + row % kernels_.panel;
  }

  // Fills a panel with factor * entry, where entries of a row stand side by side and rows are `stride` apart.
  void FillFromRows(int64_t panel, const T* rows, int64_t stride, T factor);
  // The same where the rows stand side by side and their entries are `stride` apart.
  void FillFromColumns(int64_t panel, const T* columns, int64_t stride, T factor);

 private:
  const PanelKernels<T>& kernels_;
  const int64_t rows_, depth_, panels_;
  Scratch<T> memory_;
};

// What a product writes: rows `stride` apart.
template <typename T>
struct Target {
  T* data;
  int64_t stride;
  bool accumulate = false;  // add to what is there
  bool lower = false;       // entries above the diagonal are not wanted, and may hold anything
};

// to = X Y^T for entries [from, from + depth) of the rows of X and Y.
template <typename T>
void Multiply(const Workers& workers, const Packed<T>& left, const Packed<T>& right, int64_t from, int64_t depth,
              const Target<T>& to);

}  // namespace curvax
