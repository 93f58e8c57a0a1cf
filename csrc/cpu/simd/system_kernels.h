// One dense linear system of up to a few hundred unknowns, by conjugate gradients or by a Cholesky factor, on one
// thread.
#pragma once

#include <cstdint>

#include "cpu/simd/padding.h"

namespace curvax {

// One system for conjugate gradients. The contract of its parts is in kernels/batched_cg/api.py.
template <typename T>
struct CgProblem {
  const T* matrix;  // n rows of Padded(n) entries that can be read, `stride` apart, zero beyond n
  int64_t stride;
  int64_t n;
  const T* rhs;
  const T* start;    // or null
  const T* inverse;  // or null
  T rtol;
  int maxiter;
  T* value;    // n entries
  T* scratch;  // kCgVectors vectors of Padded(n), on a boundary of 64 bytes
};

inline constexpr int64_t kCgVectors = 8;

// Systems of at most so many unknowns are solved 64 / sizeof(T) at a time, one per lane of the processor's vectors.
inline constexpr int64_t kLaneUnknowns = 16;

// Elements of scratch that they share.
template <typename T>
constexpr int64_t LaneScratch(int64_t n) {
  return kWideEntries<T> * (n + kCgVectors) * n;
}

template <typename T>
struct CgEnd {
  int result;
  int iterations;
  T residual;
};

// One symmetric positive definite matrix U^T U, its upper triangle by rows, and right-hand sides solved with it.
template <typename T>
struct CholeskyProblem {
  const T* matrix;  // as in CgProblem
  int64_t stride;
  int64_t n;
  T damping;
  T* factor;   // Padded(n) rows of Padded(n), on a boundary of 64 bytes
  T* scratch;  // kCholeskyVectors vectors of Padded(n), on a boundary of 64 bytes
};

inline constexpr int64_t kCholeskyVectors = 5;

template <typename T>
struct CholeskyEnd {
  int result;
  T residual;
};

template <typename T>
struct SystemKernels {
  // Solves `count`, 1 or 2, systems.
  void (*cg)(const CgProblem<T>* problems, int count, CgEnd<T>* ends);
  // Solves up to kWideEntries systems, one per lane, in the scratch of the first; matrices need no padding.
  void (*cg_by_lane)(const CgProblem<T>* problems, int count, CgEnd<T>* ends);
  // Fills `factor`; false where a pivot is not positive beyond rounding.
  bool (*factorize)(const CholeskyProblem<T>& problem);
  // Solves with `factor` and refines once; `factorized` is what factorize said.
  CholeskyEnd<T> (*solve)(const CholeskyProblem<T>& problem, bool factorized, const T* rhs, T* value);
};

}  // namespace curvax
