// A = Q R with Householder reflectors in blocks.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/linalg/reflectors.h"
#include "cpu/linalg/workers.h"
#include "cpu/scratch.h"

namespace curvax {

// The columns of A stand in panels, of which one after the other becomes a block of reflectors:
//
//   panel   0     1     2
//         [ R R | R R | R R ]    1. MakeBlock(0): the panel's columns become R's and two reflectors v
//         [ v R | R R | R R ]    2. the block is applied to the panels 1, 2, ...
//         [ v v | R R | R R ]    3. MakeBlock(1) from its own row on, and so on
//         [ v v | v R | R R ]    4. WriteR, and WriteQ
//         [ v v | v v | a a ]
//
// While one thread makes the next block, the others apply the last one to the panels behind it. Q is what the blocks in
// reverse make of the leading columns of the identity.
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
