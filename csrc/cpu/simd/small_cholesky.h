// The Cholesky factor of one small dense matrix A = U^T U, and systems solved with it.
//
// Left-looking, kPanel = 4 rows of U at a time: a row of U is a row of A less what the rows above say. U stands in rows
// of Padded(n) entries:
//
//            top
//   [ u u u | u u u u | u u u u u ]
//   [   u u | u u u u | u u u u u ]  finished rows
//   [     u | u u u u | u u u u u ]
//           [ p p p p | p p p p p ]  1. SubtractAbove: p -= (column of the finished rows) (finished rows), in tiles
//           [   p p p | p p p p p ]  2. FinishRow, from the top row of the panel to the last: less the panel's own
//           [     p p | p p p p p ]     rows above, over the root of its pivot
//           [       p | p p p p p ]
#pragma once

#include <cmath>
#include <cstdint>

#include "common/batched_cg.h"
#include "common/vector.h"
#include "cpu/simd/dense_vectors.h"
#include "cpu/simd/padding.h"
#include "cpu/simd/system_kernels.h"

namespace curvax {

template <typename Isa, typename T>
struct SmallCholesky : DenseVectors<Isa, T> {
  using Base = DenseVectors<Isa, T>;
  using Base::Dot;
  using Base::FillZero;
  using Base::kRows;
  using Base::kWidth;
  using Base::Load;
  using Base::Residual;
  using Base::Scale;
  using Base::Store;
  using Base::SumLanes;
  using Base::UnitRhs;
  using typename Base::V;

  // Rows that are factorized together.
  static constexpr int kPanel = 4;

  // Rows i .. i + 3, C vectors of columns from `column`: less what the rows above them say, U^T U = A.
  template <int C>
  static CURVAX_INLINE void SubtractAbove(T* u, int64_t stride, int64_t i, int64_t column) {
    V sums[kPanel][C] = {};
    for (int64_t k = 0; k < i; ++k) {
      const T* above = u + k * stride;
      V v[C];
      for (int c = 0; c < C; ++c) Load(above + column + c * kWidth, v[c]);
      for (int r = 0; r < kPanel; ++r) {
        const V factor = above[i + r] - V{};
        for (int c = 0; c < C; ++c) AddProduct(factor, v[c], sums[r][c]);
      }
    }
    for (int r = 0; r < kPanel; ++r) {
      T* row = u + (i + r) * stride + column;
      for (int c = 0; c < C; ++c) {
        V v;
        Load(row + c * kWidth, v);
        v = v - sums[r][c];
        Store(v, row + c * kWidth);
      }
    }
  }

  // Row i of the panel that begins at `top`: less what the panel's rows above it say, and divided by its pivot's root.
  static CURVAX_INLINE bool FinishRow(T* u, int64_t stride, int64_t top, int64_t i, T least) {
    const int64_t begin = top / kWidth * kWidth;
    T* row = u + i * stride;
    V v, va;
    for (int64_t k = top; k < i; ++k) {
      const T* above = u + k * stride;
      const T factor = -above[i];
      for (int64_t c = begin; c < stride; c += kWidth) {
        Load(row + c, v);
        Load(above + c, va);
        v = v + va * factor;
        Store(v, row + c);
      }
    }
    const T pivot = row[i];
    if (!(pivot > least) || !IsFinite(pivot)) return false;
    const T inverse = 1 / std::sqrt(pivot);
    for (int64_t c = begin; c < i; ++c) row[c] = 0;
    for (int64_t c = begin; c < stride; c += kWidth) {
      Load(row + c, v);
      v = v * inverse;
      Store(v, row + c);
    }
    return true;
  }

  // Copies the matrix and factorizes it. The rows beyond n are the identity's. The last vector of scratch gets the
  // inverses of U's diagonal.
  static bool Factorize(const CholeskyProblem<T>& problem) {
    const int64_t n = problem.n, padded = Padded<T>(n);
    T* u = problem.factor;
    // 0. A copy of A + damping I.
    for (int64_t i = 0; i < padded; ++i) {
      T* row = u + i * padded;
      const int64_t begin = i / kWidth * kWidth;
      if (i < n) {
        Scale(T(1), problem.matrix + i * problem.stride + begin, row + begin, padded - begin);
        row[i] += problem.damping;
      } else {
        FillZero(row + begin, padded - begin);
        row[i] = 1;
      }
    }
    // Of a diagonal entry less than this is rounding: nothing is known of it.
    const T rounding = static_cast<T>(n) * Precision<T>::eps;
    T* inverse = problem.scratch + (kCholeskyVectors - 1) * padded;
    constexpr int wide = kRows / 2 > 0 ? kRows / 2 : 1;
    for (int64_t top = 0; top < n; top += kPanel) {
      T least[kPanel];
      for (int r = 0; r < kPanel; ++r) least[r] = rounding * u[(top + r) * padded + top + r];
      // 1. Less what the finished rows say.
      int64_t column = top / kWidth * kWidth;
      for (; column + wide * kWidth <= padded; column += wide * kWidth) SubtractAbove<wide>(u, padded, top, column);
      for (; column < padded; column += kWidth) SubtractAbove<1>(u, padded, top, column);
      // 2. The panel's own rows, one after the other.
      for (int r = 0; r < kPanel; ++r) {
        const int64_t i = top + r;
        if (!FinishRow(u, padded, top, i, i < n ? least[r] : T(0))) return false;
        inverse[i] = 1 / u[i * padded + i];
      }
    }
    return true;
  }

  // y = U^-T b in place: kPanel unknowns at a time, then their rows from the rest.
  static CURVAX_INLINE void SolveTransposed(const T* u, int64_t n, const T* inverse, T* y) {
    const int64_t padded = Padded<T>(n);
    for (int64_t top = 0; top < n; top += kPanel) {
      T solution[kPanel];
      for (int r = 0; r < kPanel; ++r) {
        T rest = y[top + r];
        for (int k = 0; k < r; ++k) rest -= u[(top + k) * padded + top + r] * solution[k];
        solution[r] = rest * inverse[top + r];
      }
      for (int64_t c = top / kWidth * kWidth; c < padded; c += kWidth) {
        V v, row;
        Load(y + c, v);
        for (int r = 0; r < kPanel; ++r) {
          Load(u + (top + r) * padded + c, row);
          v = v - row * solution[r];
        }
        Store(v, y + c);
      }
      for (int r = 0; r < kPanel; ++r) y[top + r] = solution[r];
    }
  }

  // x = U^-1 y, from the last row up; x must not be y.
  static CURVAX_INLINE void SolveUpper(const T* u, int64_t n, const T* inverse, const T* y, T* x) {
    const int64_t padded = Padded<T>(n);
    FillZero(x, padded);
    for (int64_t top = (n + kPanel - 1) / kPanel * kPanel - kPanel; top >= 0; top -= kPanel) {
      V sums[kPanel] = {};
      for (int64_t c = top / kWidth * kWidth; c < padded; c += kWidth) {
        V v, row;
        Load(x + c, v);
        for (int r = 0; r < kPanel; ++r) {
          Load(u + (top + r) * padded + c, row);
          AddProduct(row, v, sums[r]);
        }
      }
      T rest[kPanel];
      for (int r = 0; r < kPanel; ++r) rest[r] = y[top + r] - SumLanes(sums[r]);
      for (int r = kPanel - 1; r >= 0; --r) {
        for (int k = r + 1; k < kPanel; ++k) rest[r] -= u[(top + r) * padded + top + k] * rest[k];
        rest[r] *= inverse[top + r];
      }
      for (int r = 0; r < kPanel; ++r) x[top + r] = rest[r];
    }
  }

  static bool MatrixIsFinite(const CholeskyProblem<T>& problem) {
    T sum = 0;
    for (int64_t i = 0; i < problem.n; ++i)
      for (int64_t j = 0; j < problem.n; ++j) sum += problem.matrix[i * problem.stride + j] * 0;
    return IsFinite(sum + problem.damping * 0);
  }

  static CholeskyEnd<T> Solve(const CholeskyProblem<T>& problem, bool factorized, const T* rhs, T* value) {
    const int64_t n = problem.n, padded = Padded<T>(n);
    T *b = problem.scratch, *x = b + padded, *r = x + padded, *q = r + padded;
    const T* inverse = q + padded;
    T size, unit;
    UnitRhs(rhs, n, b, size, unit);
    const T nan = static_cast<T>(__builtin_nan(""));
    if (!factorized || !IsFinite(size)) {
      for (int64_t i = 0; i < n; ++i) value[i] = nan;
      const bool finite = IsFinite(size) && MatrixIsFinite(problem);
      return {finite ? kNotPositiveDefinite : kNonFinite, nan};
    }
    // 1. x = (U^T U)^-1 b.
    Scale(T(1), b, r, padded);
    SolveTransposed(problem.factor, n, inverse, r);
    SolveUpper(problem.factor, n, inverse, r, x);
    // 2. One step of refinement: x += (U^T U)^-1 (b - A x).
    Residual(problem.matrix, problem.stride, n, problem.damping, b, x, q, r);
    SolveTransposed(problem.factor, n, inverse, r);
    SolveUpper(problem.factor, n, inverse, r, q);
    for (int64_t i = 0; i < padded; ++i) x[i] += q[i];
    // 3. What is left.
    Residual(problem.matrix, problem.stride, n, problem.damping, b, x, q, r);
    const T residual = std::sqrt(Dot(r, r, padded));
    const bool finite = IsFinite(residual);
    for (int64_t i = 0; i < n; ++i) value[i] = finite ? x[i] * size : nan;
    if (!finite) return {kNonFinite, nan};
    return {kConverged, size == 0 ? T(0) : residual};
  }
};

}  // namespace curvax
