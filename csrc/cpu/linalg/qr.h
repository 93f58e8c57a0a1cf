// A = Q R with Householder reflectors in blocks.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/linalg/reflectors.h"
#include "cpu/linalg/workers.h"
#include "cpu/scratch.h"

namespace curvax {

// The columns of A stand in panels, of which one after the other becomes a block of reflectors: while one thread makes
// the next block, the others take the panels behind it through the last one. Q is the leading columns of the identity,
// taken through the blocks in reverse.
//
// Each column is first divided by a power of two that brings it to size one, and the column of R multiplied by it at
// the end: Q does not depend on it, and no product leaves the range of T.
template <typename T>
class Qr {
 public:
  Qr(const Workers& workers, int64_t rows, int64_t columns);

  // Q (rows, k) and R (k, columns) for k the smaller of rows and columns, NaN where the matrix holds NaN or infinity;
  // a Result.
  int Factorize(const T* matrix, T* q, T* r);

 private:
  T* Panel(int64_t panel) const { return panels_.data() + panel * length_ * width_; }
  void Load(const T* matrix, int64_t panel);
  void MakeBlock(int64_t panel);
  void WriteR(T* r, int64_t panel) const;
  void WriteQ(T* q, int64_t panel) const;

  const Workers& workers_;
  const int64_t rows_, columns_, rank_, width_, length_;
  Scratch<T> panels_;
  Scratch<T> reflectors_;  // of the present block, in rows
  std::vector<std::unique_ptr<ReflectorBlock<T>>> blocks_;
  std::vector<T> factors_;  // of the columns
};

}  // namespace curvax
