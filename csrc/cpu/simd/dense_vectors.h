// Vectors of one dense system, and the product of its matrix with one. Vectors have Padded(n) entries, zeros behind n.
//
// q = A p for symmetric A is a sum of rows: q = p[0] A[0] + p[1] A[1] + ... A tile of kRows vectors of q stays in
// registers while the rows go by, in kSplits sums that do not wait for each other's additions:
//
//            kRows vectors
//           <------------->
//   A[0]   [ . . . . . . . | ...    times p[0]  into sums[0]
//   A[1]   [ . . . . . . . | ...    times p[1]  into sums[1]
//   A[2]   [ . . . . . . . | ...    times p[2]  into sums[0]
//    ...                             after kRun rows: total += sums[0] + sums[1]
//   q      [ total         | ...
#pragma once

#include <cstdint>

#include "common/batched_cg.h"
#include "common/vector.h"
#include "cpu/simd/padding.h"
#include "cpu/simd/vectors.h"

namespace curvax {

template <typename Isa, typename T>
struct DenseVectors : WideVectors<Isa, T> {
  using Base = WideVectors<Isa, T>;
  using Base::kWidth;
  using Base::Load;
  using Base::Store;
  using typename Base::V;

  // Accumulators of 64 bytes, kRows in kSplits copies, fill half of the registers: 16 of them hold 4 at baseline
  // and 8 with AVX2, the 32 of AVX-512 hold 32.
  static constexpr int kRows = Isa::kRegisterBytes == 64 ? 8 : Isa::kRegisterBytes / 16;
  static constexpr int kSplits = 2;

  // The sum of the lanes, by halves: each step adds the vector to itself, rotated.
  static CURVAX_INLINE T SumLanes(const V& v) {
    V sum = v;
    if constexpr (kWidth == 16) {
      sum += __builtin_shufflevector(sum, sum, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
      sum += __builtin_shufflevector(sum, sum, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
      sum += __builtin_shufflevector(sum, sum, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
      sum += __builtin_shufflevector(sum, sum, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    } else {
      sum += __builtin_shufflevector(sum, sum, 4, 5, 6, 7, 0, 1, 2, 3);
      sum += __builtin_shufflevector(sum, sum, 2, 3, 0, 1, 6, 7, 4, 5);
      sum += __builtin_shufflevector(sum, sum, 1, 0, 3, 2, 5, 4, 7, 6);
    }
    return sum[0];
  }

  static CURVAX_INLINE T Dot(const T* a, const T* b, int64_t padded) {
    V even = {}, odd = {}, va, vb;
    int64_t i = 0;
    for (; i + 2 * kWidth <= padded; i += 2 * kWidth) {
      Load(a + i, va);
      Load(b + i, vb);
      AddProduct(va, vb, even);
      Load(a + i + kWidth, va);
      Load(b + i + kWidth, vb);
      AddProduct(va, vb, odd);
    }
    if (i < padded) {
      Load(a + i, va);
      Load(b + i, vb);
      AddProduct(va, vb, even);
    }
    even += odd;
    return SumLanes(even);
  }

  // The largest magnitude; NaN goes unnoticed.
  static CURVAX_INLINE T MaxAbs(const T* a, int64_t padded) {
    V largest = {}, v;
    for (int64_t i = 0; i < padded; i += kWidth) {
      Load(a + i, v);
      v = v < 0 ? -v : v;
      largest = largest < v ? v : largest;
    }
    T lanes[kWidth], of_lanes = 0;
    Store(largest, lanes);
    for (int64_t l = 0; l < kWidth; ++l) of_lanes = of_lanes < lanes[l] ? lanes[l] : of_lanes;
    return of_lanes;
  }

  // to = scale a.
  static CURVAX_INLINE void Scale(T scale, const T* a, T* to, int64_t padded) {
    V v;
    for (int64_t i = 0; i < padded; i += kWidth) {
      Load(a + i, v);
      v = v * scale;
      Store(v, to + i);
    }
  }

  // n entries and zeros behind them.
  static CURVAX_INLINE void CopyPadded(const T* from, T* to, int64_t n, int64_t padded) {
    __builtin_memcpy(to, from, n * sizeof(T));
    for (int64_t i = n; i < padded; ++i) to[i] = 0;
  }

  static CURVAX_INLINE void FillZero(T* to, int64_t padded) {
    const V zero = {};
    for (int64_t i = 0; i < padded; i += kWidth) Store(zero, to + i);
  }

  // Columns in runs of this many, each summed by itself: a lane adds up at most 64 / splits products, then the runs.
  static constexpr int64_t kRun = 64;

  // A scalar less zero is that scalar in every lane, and the compiler knows it; plus zero would be an addition.
  // R vectors of q = sum over rows j of p[j] * a[j], in S interleaved sums.
  template <int R, int S>
  static CURVAX_INLINE void ProductOf(const T* a, int64_t stride, int64_t n, const T* p, T* q) {
    V total[R] = {};
    for (int64_t begin = 0; begin < n; begin += kRun) {
      const int64_t end = begin + kRun < n ? begin + kRun : n;
      V sums[S][R] = {};
      int64_t j = begin;
      for (; j + S <= end; j += S) {
        for (int s = 0; s < S; ++s) {
          const T* row = a + (j + s) * stride;
          const V factor = p[j + s] - V{};
          for (int r = 0; r < R; ++r) {
            V v;
            Load(row + r * kWidth, v);
            AddProduct(factor, v, sums[s][r]);
          }
        }
      }
      for (; j < end; ++j) {
        const T* row = a + j * stride;
        const V factor = p[j] - V{};
        for (int r = 0; r < R; ++r) {
          V v;
          Load(row + r * kWidth, v);
          AddProduct(factor, v, sums[0][r]);
        }
      }
      for (int step = S / 2; step > 0; step /= 2)
        for (int s = 0; s < step; ++s)
          for (int r = 0; r < R; ++r) sums[s][r] += sums[s + step][r];
      for (int r = 0; r < R; ++r) total[r] += sums[0][r];
    }
    for (int r = 0; r < R; ++r) Store(total[r], q + r * kWidth);
  }

  // q = A p for symmetric A.
  static void Product(const T* a, int64_t stride, int64_t n, const T* p, T* q) {
    constexpr int rows = kRows, splits = kSplits;
    int64_t left = Padded<T>(n) / kWidth;
    for (; left >= rows; left -= rows, a += rows * kWidth, q += rows * kWidth)
      ProductOf<rows, splits>(a, stride, n, p, q);
    if constexpr (rows > 4) {
      if (left >= 4) {
        ProductOf<4, 4>(a, stride, n, p, q);
        left -= 4, a += 4 * kWidth, q += 4 * kWidth;
      }
      if (left == 3) ProductOf<3, 4>(a, stride, n, p, q);
      if (left == 2) ProductOf<2, 4>(a, stride, n, p, q);
    }
    if (left == 1) ProductOf<1, 4>(a, stride, n, p, q);
  }

  // r = b - A x, with A x in q.
  static CURVAX_INLINE void Residual(const T* matrix, int64_t stride, int64_t n, T damping, const T* b, const T* x,
                                     T* q, T* r) {
    Product(matrix, stride, n, x, q);
    V vb, vq, vx;
    for (int64_t i = 0; i < Padded<T>(n); i += kWidth) {
      Load(b + i, vb);
      Load(q + i, vq);
      Load(x + i, vx);
      vb = vb - vq - vx * damping;
      Store(vb, r + i);
    }
  }

  // b = rhs / |rhs|; returns |rhs| and its inverse.
  static CURVAX_INLINE void UnitRhs(const T* rhs, int64_t n, T* b, T& size, T& unit) {
    const int64_t padded = Padded<T>(n);
    CopyPadded(rhs, b, n, padded);
    const T largest = MaxAbs(b, padded);
    const T safe = largest > 0 && IsFinite(largest) ? largest : T(1);
    V v, squares = {};
    for (int64_t i = 0; i < padded; i += kWidth) {
      Load(b + i, v);
      v = v / safe;
      AddProduct(v, v, squares);
    }
    UnitScale<T>(largest, SumLanes(squares), size, unit);
    Scale(unit, b, b, padded);
  }
};

}  // namespace curvax
