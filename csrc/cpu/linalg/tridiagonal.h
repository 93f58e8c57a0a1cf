// A = Q T Q^T with T tridiagonal, by Householder reflectors in blocks (Dongarra, Sorensen and Hammarling 1989).
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/linalg/workers.h"
#include "cpu/scratch.h"
#include "cpu/simd/kernels.h"

namespace curvax {

// Which is faster, one thread or all, for many short calls of one kind. Threads have to meet after each, so where
// others want the cores too, one of them may make the rest wait longer than the work takes; how the machine is doing
// now, only the clock knows. Both ways have the same result.
class Pace {
 public:
  // Whether the next calls are to share their work among all threads: the way that was faster last, and from time to
  // time the other.
  bool Share();
  // How long they took, per unit of work.
  void Took(bool shared, double seconds) { seconds_[shared] = seconds; }

 private:
  double seconds_[2] = {0, 0};  // alone, shared; 0 for never tried
  int64_t turns_ = 0;
};

// For i = n - 1, n - 2, ..., 1, in blocks of rows:
//   1. UpdateRow          row i less what the earlier reflectors of this block subtract from it
//   2. MakeReflectorOf    v takes the row left of the diagonal to (0, ..., 0, beta)
//   3. SymmetricProduct   w = tau A v - (tau / 2) (w.v) v, with A as it was before this block,
//                         corrected for the block's reflectors
//   4. UpdateLeading      after a block: A = A - V^T W - W^T V, one matrix product
//
//   a . . . .         a . . . .          after row 4: what is left is the leading 4 x 4 part
//   a a . . .         a a . . .
//   a a a . .    ->   a a a . .
//   a a a a .         a a a a .
//   a a a a a         v v v 1 d   <- row 4: d on the diagonal, its reflector in place; beta beside the diagonal of T
//
// Rows go from the last one up: reflector i takes the i entries of row i left of the diagonal to a multiple of the last
// of them. So what is left to do is always the leading part of the matrix, whose rows begin on a boundary, and each
// reflector stays in the row that it came from. Q = H_(n-1) ... H_1.
template <typename T>
class Tridiagonal {
 public:
  Tridiagonal(const Workers& workers, int64_t n);

  // The lower triangle of a matrix whose rows are `stride` apart, each entry times `factor`, which keeps products of
  // entries in range.
  void Reduce(const T* matrix, int64_t stride, T factor);

  // T: its diagonal, and the n - 1 entries beside it.
  double* diagonal() { return diagonal_.data(); }
  double* beside() { return beside_.data(); }
  // Row i has reflector i: i entries, a one the last of them, zeros up to the next multiple of kWideEntries.
  const T* reflectors() const { return rows_.data(); }
  int64_t stride() const { return stride_; }
  const T* tau() const { return tau_.data(); }

 private:
  T* Row(int64_t i) const { return rows_.data() + i * stride_; }
  void ReduceRows(int64_t begin, int64_t end);
  void UpdateRow(int64_t i, int64_t done);
  void MakeReflectorOf(int64_t i);
  void SymmetricProduct(int64_t i, const T* x, T* y);
  void ProductInPieces(int64_t i, const T* x, T* y);
  void UpdateLeading(int64_t begin, int64_t count);

  const Workers& workers_;
  const int64_t n_, stride_;
  Scratch<T> rows_;
  Scratch<T> left_, right_;  // v and w of the present block: A less v w^T + w v^T is what is left
  Scratch<T> parts_;         // a product's share of each piece
  Pace pace_;
  bool share_ = false;
  double product_seconds_ = 0;  // of the present block
  std::vector<double> diagonal_, beside_;
  std::vector<T> tau_;
};

}  // namespace curvax
