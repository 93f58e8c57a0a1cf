// One step of divide and conquer: the eigenvectors of two halves become those of the whole.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/linalg/packed.h"
#include "cpu/linalg/secular.h"
#include "cpu/linalg/workers.h"

namespace curvax {

// Rows [begin, middle) and [middle, end) of a tridiagonal matrix. Row i of `from` is an eigenvector of its half, with
// entries in the half's columns and anything elsewhere, and diagonal[i] its eigenvalue; `order` has the rows of each
// half by rising eigenvalue. `to`, `diagonal` and `order` become those of the whole.
template <typename T>
struct Part {
  int64_t begin, middle, end, stride;
  double* diagonal;
  int64_t* order;
  T* from;
  T* to;
};

// The whole is V^T (D + rho z z^T) V with the halves' eigenvectors in the rows of V and eigenvalues, the poles, in D:
//   1. Gather       the poles of both halves by size, and z
//   2. Deflate      what z hardly touches, or equals a neighbor in D, is an eigenpair as it is
//   3. FindRoots    of the rest, the eigenvalues of D + rho z z^T, from the secular equation (cpu/linalg/secular.h)
//   4. RestoreZ     the z for which these roots are exact (Loewner's formula, Gu and Eisenstat 1994), with which
//                   eigenvectors are orthogonal to rounding, however close the roots are
//   5. MakeVectors  the eigenvectors of D + rho z z^T times V
//   6. Finish       the eigenpairs of step 2 go behind them, and all are ordered
//
// With rho > 0 every root lies between its pole and the next:
//
//      pole 0       pole 1            pole 2
//   -----|---x---------|------------x----|----------x------>
//           root 0                root 1          root 2
template <typename T>
class Merge {
 public:
  // `cut` is the entry beside the diagonal that couples the halves.
  Merge(const Workers& workers, const Part<T>& part, double cut);
  void Run();

 private:
  // Where a row of V has entries.
  enum Support : char { kFirst, kBoth, kSecond };
  struct Pair {
    double pole, z;
    int64_t row;
    Support support;
  };

  void Gather();
  void Deflate();
  bool Combine(Pair& before, Pair& now, double tolerance);
  void FindRoots();
  void RestoreZ();
  void MakeVectors();
  void Finish();
  T* Row(int64_t row) const { return part_.from + row * part_.stride; }
  Workers Worth(int64_t work) const { return workers_.Of(work); }

  const Workers& workers_;
  const Part<T> part_;
  const double cut_;
  double rho_;
  std::vector<Pair> pairs_;              // by rising pole
  std::vector<Pair> active_, deflated_;  // a partition of them
  std::vector<double> poles_, squares_, origins_, shifts_;
};

}  // namespace curvax
