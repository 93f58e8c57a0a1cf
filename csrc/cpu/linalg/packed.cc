#include "cpu/linalg/packed.h"

#include <algorithm>

namespace curvax {
namespace {

// A piece of a product: so many rows of the left operand, whose kDepth entries stay in the second-level cache, by so
// many panels of the right one.
constexpr int64_t kPieceRows = 128;
constexpr int64_t kPiecePanels = 8;

template <typename T>
struct Piece {
  int64_t first_row, end_row, first_panel, end_panel;

  bool AboveDiagonal(int64_t width) const { return first_panel * width >= end_row; }
};

template <typename T>
void MultiplyPiece(const PanelKernels<T>& kernels, const Packed<T>& left, const Packed<T>& right, int64_t from,
                   int64_t depth, const Target<T>& to, const Piece<T>& piece) {
  const int64_t width = kernels.panel;
  if (depth == 0 && !to.accumulate)
    for (int64_t row = piece.first_row; row < piece.end_row; ++row)
      std::fill(to.data + row * to.stride + piece.first_panel * width,
                to.data + row * to.stride + std::min(right.rows(), piece.end_panel * width), T(0));
  for (int64_t k = 0; k < depth; k += kDepth) {
    const int64_t part = std::min(kDepth, depth - k);
    const bool add = to.accumulate || k > 0;
    for (int64_t panel = piece.first_panel; panel < piece.end_panel; ++panel) {
      const int64_t column = panel * width, columns = std::min(width, right.rows() - column);
      for (int64_t row = piece.first_row; row < piece.end_row; row += kernels.strip) {
        const int64_t rows = std::min(kernels.strip, piece.end_row - row);
        if (to.lower && column >= row + rows) continue;
        T* at = to.data + row * to.stride + column;
        kernels.accumulate(left.At(row, from + k), right.At(column, from + k), part, nullptr, add ? at : nullptr, at,
                           to.stride, rows, columns);
      }
    }
  }
}

}  // namespace

template <typename T>
Packed<T>::Packed(int64_t rows, int64_t depth)
    : kernels_(Kernels<T>().panels),
      rows_(rows),
      depth_(depth),
      panels_((rows + kernels_.panel - 1) / kernels_.panel),
      memory_(panels_ * depth * kernels_.panel) {}

template <typename T>
void Packed<T>::FillFromRows(int64_t panel, const T* rows, int64_t stride, T factor) {
  const int64_t width = kernels_.panel, first = panel * width, valid = std::min(width, rows_ - first);
  T* to = At(first, 0);
  for (int64_t r = 0; r < valid; ++r) {
    const T* row = rows + (first + r) * stride;
    for (int64_t k = 0; k < depth_; ++k) to[k * width + r] = factor * row[k];
  }
  if (valid < width)
    for (int64_t k = 0; k < depth_; ++k) std::fill(to + k * width + valid, to + (k + 1) * width, T(0));
}

template <typename T>
void Packed<T>::FillFromColumns(int64_t panel, const T* columns, int64_t stride, T factor) {
  const int64_t width = kernels_.panel, first = panel * width, valid = std::min(width, rows_ - first);
  T* to = At(first, 0);
  for (int64_t k = 0; k < depth_; ++k, to += width) {
    const T* from = columns + k * stride + first;
    for (int64_t r = 0; r < valid; ++r) to[r] = factor * from[r];
    std::fill(to + valid, to + width, T(0));
  }
}

template <typename T>
void Multiply(const Workers& workers, const Packed<T>& left, const Packed<T>& right, int64_t from, int64_t depth,
              const Target<T>& to) {
  const int64_t rows = left.rows(), panels = right.panels(), width = right.width();
  const int64_t across = (panels + kPiecePanels - 1) / kPiecePanels;
  const int64_t down = (rows + kPieceRows - 1) / kPieceRows;
  const PanelKernels<T>& kernels = Kernels<T>().panels;
  workers.Of(rows * panels * width * depth).For(down * across, [&](int64_t k) {
    const int64_t row = k / across * kPieceRows, panel = k % across * kPiecePanels;
    const Piece<T> piece = {row, std::min(rows, row + kPieceRows), panel, std::min(panels, panel + kPiecePanels)};
    if (!to.lower || !piece.AboveDiagonal(width)) MultiplyPiece(kernels, left, right, from, depth, to, piece);
  });
}

template class Packed<float>;
template class Packed<double>;
template void Multiply<float>(const Workers&, const Packed<float>&, const Packed<float>&, int64_t, int64_t,
                              const Target<float>&);
template void Multiply<double>(const Workers&, const Packed<double>&, const Packed<double>&, int64_t, int64_t,
                               const Target<double>&);

}  // namespace curvax
