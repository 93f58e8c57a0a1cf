// One symmetric positive definite system per thread block, by a Cholesky factor in shared memory and one step of
// refinement. A thread owns one row of the factor and one entry of every vector:
//
//   [ l                ]  thread 0
//   [ l  l             ]  thread 1      column k is made by all threads below row k at once,
//   [ l  l  k          ]  thread 2      each from its own row and row k
//   [ l  l  k  a       ]  thread 3
#pragma once

#include <cmath>
#include <cstdint>

#include "common/batch.h"
#include "common/batched_cg.h"
#include "cuda/batched_cg.cuh"
#include "cuda/reduce.cuh"
#include "cuda/shared.cuh"

namespace curvax {

inline constexpr int kCholeskyThreads = 128;  // and most unknowns

template <typename T>
struct CholeskyArguments {
  const void* matrices;
  const T *rhs, *damping;
  Broadcast of_matrices, of_rhs, of_damping;
  T *value, *residual;
  int32_t *result, *iterations;
  int n;
};

// A block's shared memory, in elements of T:
//
//   | factor: n rows of `stride` | vector: kCholeskyThreads | partial 0: kWarps | partial 1: kWarps |
//
// `vector` is what threads pass to each other. Two sums in turn take the partial sums by turns, so that neither waits
// for the other's readers.
template <typename T>
struct CholeskyShared {
  static constexpr int kWarps = kCholeskyThreads / kWarp;

  int stride;
  T* factor;
  T* vector;
  T* partial[2];

  // Rows an odd number of elements apart: threads that read down a column meet no bank twice.
  static CURVAX_INLINE constexpr int Stride(int n) { return n | 1; }

  static constexpr int64_t Bytes(int n) {
    return static_cast<int64_t>(sizeof(T)) * (n * Stride(n) + kCholeskyThreads + 2 * kWarps);
  }

  __device__ __forceinline__ CholeskyShared(char* bytes, int n)
      : stride(Stride(n)),
        factor(reinterpret_cast<T*>(bytes)),
        vector(factor + n * stride),
        partial{vector + kCholeskyThreads, vector + kCholeskyThreads + kWarps} {}
};

// Left-looking: column k of L is what the columns before it leave of A's, over its pivot's root. Says whether every
// pivot is positive beyond rounding; all threads agree.
template <typename T>
__device__ __forceinline__ bool FactorizeShared(const CholeskyShared<T>& shared, int n, T& inverse) {
  const int i = static_cast<int>(threadIdx.x);
  const T* own = shared.factor + i * shared.stride;
  const T rounding = static_cast<T>(n) * Precision<T>::eps;
  for (int k = 0; k < n; ++k) {
    T rest = 0, diagonal = 0;
    if (i >= k && i < n) {
      const T* pivot_row = shared.factor + k * shared.stride;
      diagonal = own[k];
      T sums[4] = {};
      int j = 0;
      for (; j + 4 <= k; j += 4) {
#pragma unroll
        for (int l = 0; l < 4; ++l) AddProduct(own[j + l], pivot_row[j + l], sums[l]);
      }
      for (; j < k; ++j) AddProduct(own[j], pivot_row[j], sums[0]);
      rest = diagonal - ((sums[0] + sums[1]) + (sums[2] + sums[3]));
    }
    if (i == k) {
      shared.vector[0] = rest > rounding * diagonal && IsFinite(rest) ? static_cast<T>(1 / std::sqrt(rest)) : T(0);
    }
    __syncthreads();
    const T scale = shared.vector[0];
    if (scale == 0) return false;
    if (i == k) inverse = scale;
    if (i >= k && i < n) shared.factor[i * shared.stride + k] = rest * scale;
    __syncthreads();
  }
  return true;
}

// x = L^-T L^-1 b, an entry per thread; `inverse` is that of the thread's diagonal entry.
template <typename T>
__device__ __forceinline__ T Substitute(const CholeskyShared<T>& shared, int n, T inverse, T b) {
  const int i = static_cast<int>(threadIdx.x);
  T v = b;
  for (int k = 0; k < n; ++k) {
    if (i == k) shared.vector[k] = v = v * inverse;
    __syncthreads();
    if (i > k && i < n) v -= shared.factor[i * shared.stride + k] * shared.vector[k];
  }
  __syncthreads();
  for (int k = n - 1; k >= 0; --k) {
    if (i == k) shared.vector[k] = v = v * inverse;
    __syncthreads();
    if (i < k) v -= shared.factor[k * shared.stride + i] * shared.vector[k];
  }
  __syncthreads();
  return v;
}

template <typename T, typename Element>
__global__ void __launch_bounds__(kCholeskyThreads)
    BatchedCholeskySolveKernel(const __grid_constant__ CholeskyArguments<T> a) {
  constexpr int kWarps = CholeskyShared<T>::kWarps;
  const int i = static_cast<int>(threadIdx.x), n = a.n;
  const bool inside = i < n;
  const int64_t system = blockIdx.x;
  const CholeskyShared<T> shared(DynamicShared(), n);
  const Element* matrix = static_cast<const Element*>(a.matrices) + a.of_matrices.At(system) * n * n;
  const T damping = a.damping[a.of_damping.At(system)];

  // 1. The matrix, and whether it is finite: an infinity or NaN times zero is NaN.
  T one[1] = {damping * 0};
  for (int at = i; at < n * n; at += kCholeskyThreads) {
    const int row = at / n, column = at % n;
    const T entry = Widened<T, Element>(matrix[at]);
    one[0] += entry * 0;
    shared.factor[row * shared.stride + column] = row == column ? entry + damping : entry;
  }
  Everywhere<kWarps>(one, shared.partial[0], Plus());
  bool finite = one[0] == 0;

  // 2. The right-hand side at norm 1.
  T b = inside ? a.rhs[a.of_rhs.At(system) * n + i] : T(0);
  one[0] = b < 0 ? -b : b;
  Everywhere<kWarps>(one, shared.partial[1], Larger());
  const T largest = one[0];
  one[0] = b / (largest > 0 && IsFinite(largest) ? largest : T(1));
  one[0] *= one[0];
  Everywhere<kWarps>(one, shared.partial[0], Plus());
  T size, unit;
  UnitScale<T>(largest, one[0], size, unit);
  b *= unit;
  finite = finite && IsFinite(size);

  T x = 0, inverse = 0, residual = 0;
  // 3. The factor. The same in every thread, so that all meet at the barriers.
  const bool factorized = finite && FactorizeShared<T>(shared, n, inverse);
  if (factorized) {
    // b - (A + damping I) x with the matrix itself, which by now is in the cache: columns, for it is symmetric.
    const auto rest = [&](T v) {
      shared.vector[i] = v;
      __syncthreads();
      T even = 0, odd = 0;
      int j = 0;
      for (; inside && j + 2 <= n; j += 2) {
        AddProduct(Widened<T, Element>(matrix[j * n + i]), shared.vector[j], even);
        AddProduct(Widened<T, Element>(matrix[(j + 1) * n + i]), shared.vector[j + 1], odd);
      }
      if (inside && j < n) AddProduct(Widened<T, Element>(matrix[j * n + i]), shared.vector[j], even);
      __syncthreads();
      return b - (even + odd) - damping * v;
    };
    // 4. x = (L L^T)^-1 b, one step of refinement, and what is left.
    x = Substitute<T>(shared, n, inverse, b);
    x += Substitute<T>(shared, n, inverse, rest(x));
    one[0] = rest(x);
    one[0] *= one[0];
    Everywhere<kWarps>(one, shared.partial[1], Plus());
    residual = size == 0 ? T(0) : static_cast<T>(std::sqrt(one[0]));
    finite = IsFinite(residual);
  }
  const bool solved = factorized && finite;
  const T nan = static_cast<T>(NAN);
  if (inside) a.value[system * n + i] = solved ? x * size : nan;
  if (i == 0) {
    a.result[system] = solved ? kConverged : finite ? kNotPositiveDefinite : kNonFinite;
    a.iterations[system] = 0;
    a.residual[system] = solved ? residual : nan;
  }
}

}  // namespace curvax
