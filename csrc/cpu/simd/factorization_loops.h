// The loops of cpu/simd/factorization_kernels.h. Those over many rows take four at a time, to read the vector that all
// of them meet once for four.
#pragma once

#include <cmath>
#include <cstdint>

#include "cpu/simd/factorization_kernels.h"
#include "cpu/simd/vectors.h"

namespace curvax {

template <typename Isa, typename T>
struct FactorizationLoops : WideVectors<Isa, T> {
  using Base = WideVectors<Isa, T>;
  using Base::kWidth;
  using Base::Load;
  using Base::Store;
  using Base::SumByHalves;
  using typename Base::V;

  using Double = WideVectors<Isa, double>;
  using Doubles = typename Double::V;
  static constexpr int64_t kDoubles = Double::kWidth;

  // R rows from row `row` on. The entry on the diagonal counts twice, with its row and with its column, and once too
  // often.
  template <int R>
  static CURVAX_INLINE void SymmetricRow(const T* a, int64_t stride, int64_t row, const T* x, T* y) {
    const T* rows = a + row * stride;
    V sums[R], own[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      sums[r] = V{};
      own[r] = x[row + r] - V{};
    }
    for (int64_t c = 0; c < row + R; c += kWidth) {
      V of_x, of_y;
      Load(x + c, of_x);
      Load(y + c, of_y);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        V entry;
        Load(rows + r * stride + c, entry);
        sums[r] += entry * of_x;
        of_y += entry * own[r];
      }
      Store(of_y, y + c);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) y[row + r] += SumByHalves(sums[r]) - rows[r * stride + row + r] * x[row + r];
  }

  static void SymmetricRows(const T* a, int64_t stride, int64_t begin, int64_t end, const T* x, T* y) {
    int64_t row = begin;
    for (; row + 4 <= end; row += 4) SymmetricRow<4>(a, stride, row, x, y);
    for (; row < end; ++row) SymmetricRow<1>(a, stride, row, x, y);
  }

  template <int R>
  static CURVAX_INLINE void DotsOf(const T* rows, int64_t stride, int64_t n, const T* x, T* sums) {
    V parts[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) parts[r] = V{};
    for (int64_t c = 0; c < n; c += kWidth) {
      V of_x;
      Load(x + c, of_x);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        V entry;
        Load(rows + r * stride + c, entry);
        parts[r] += entry * of_x;
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sums[r] = SumByHalves(parts[r]);
  }

  static void Dots(const T* rows, int64_t stride, int64_t count, int64_t n, const T* x, T* sums) {
    int64_t row = 0;
    for (; row + 4 <= count; row += 4) DotsOf<4>(rows + row * stride, stride, n, x, sums + row);
    for (; row < count; ++row) DotsOf<1>(rows + row * stride, stride, n, x, sums + row);
  }

  template <int R>
  static CURVAX_INLINE void AddRowsOf(const T* rows, int64_t stride, int64_t n, const T* factors, T* y) {
    V own[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) own[r] = factors[r] - V{};
    for (int64_t c = 0; c < n; c += kWidth) {
      V of_y;
      Load(y + c, of_y);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        V entry;
        Load(rows + r * stride + c, entry);
        of_y += entry * own[r];
      }
      Store(of_y, y + c);
    }
  }

  static void AddRows(const T* rows, int64_t stride, int64_t count, int64_t n, const T* factors, T* y) {
    int64_t row = 0;
    for (; row + 4 <= count; row += 4) AddRowsOf<4>(rows + row * stride, stride, n, factors + row, y);
    for (; row < count; ++row) AddRowsOf<1>(rows + row * stride, stride, n, factors + row, y);
  }

  template <int R>
  static CURVAX_INLINE void AddOuterOf(const T* factors, const T* x, int64_t n, T* rows, int64_t stride) {
    V own[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) own[r] = factors[r] - V{};
    for (int64_t c = 0; c < n; c += kWidth) {
      V of_x;
      Load(x + c, of_x);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        V entry;
        Load(rows + r * stride + c, entry);
        entry += of_x * own[r];
        Store(entry, rows + r * stride + c);
      }
    }
  }

  static void AddOuter(const T* factors, const T* x, int64_t count, int64_t n, T* rows, int64_t stride) {
    int64_t row = 0;
    for (; row + 4 <= count; row += 4) AddOuterOf<4>(factors + row, x, n, rows + row * stride, stride);
    for (; row < count; ++row) AddOuterOf<1>(factors + row, x, n, rows + row * stride, stride);
  }

  static double Squares(const T* x, int64_t n) {
    Doubles sums[2] = {};
    for (int64_t c = 0; c < n; c += kWidth)
      for (int64_t at = 0; at < kWidth; at += kDoubles) {
        Doubles entries;
        for (int64_t lane = 0; lane < kDoubles; ++lane) entries[lane] = static_cast<double>(x[c + at + lane]);
        sums[(at / kDoubles) % 2] += entries * entries;
      }
    return Double::SumByHalves(sums[0] + sums[1]);
  }

  static void Scale(T factor, const T* x, int64_t n, T* y) {
    const V own = factor - V{};
    for (int64_t c = 0; c < n; c += kWidth) {
      V entry;
      Load(x + c, entry);
      entry = entry * own;
      Store(entry, y + c);
    }
  }

  static void Rotate(T c, T s, T* a, T* b, int64_t n) {
    const V cosine = c - V{}, sine = s - V{};
    for (int64_t i = 0; i < n; i += kWidth) {
      V of_a, of_b;
      Load(a + i, of_a);
      Load(b + i, of_b);
      const V left = cosine * of_a + sine * of_b, right = cosine * of_b - sine * of_a;
      Store(left, a + i);
      Store(right, b + i);
    }
  }

  // Terms squares / (pole - x) of kDoubles poles, and those over (pole - x) once more.
  static CURVAX_INLINE void SecularTerms(const double* poles, const double* squares, const Doubles& origin,
                                         const Doubles& shift, Doubles& terms, Doubles& slopes) {
    Doubles pole, square;
    Double::Load(poles, pole);
    Double::Load(squares, square);
    const Doubles inverse = 1.0 / ((pole - origin) - shift);
    terms = square * inverse;
    slopes = terms * inverse;
  }

  static SecularSums Secular(const double* poles, const double* squares, int64_t split, int64_t n, double origin,
                             double shift) {
    const Doubles at = origin - Doubles{}, by = shift - Doubles{};
    Doubles sums[2] = {}, of_slopes[2] = {}, terms, slopes;
    int64_t i = 0;
    for (; i + kDoubles <= split; i += kDoubles) {
      SecularTerms(poles + i, squares + i, at, by, terms, slopes);
      sums[0] += terms;
      of_slopes[0] += slopes;
    }
    if (i < split) {
      SecularTerms(poles + i, squares + i, at, by, terms, slopes);
      for (int64_t lane = 0; lane < kDoubles; ++lane) {
        sums[i + lane >= split][lane] += terms[lane];
        of_slopes[i + lane >= split][lane] += slopes[lane];
      }
      i += kDoubles;
    }
    for (; i < n; i += kDoubles) {
      SecularTerms(poles + i, squares + i, at, by, terms, slopes);
      sums[1] += terms;
      of_slopes[1] += slopes;
    }
    return {Double::SumByHalves(sums[0]), Double::SumByHalves(of_slopes[0]), Double::SumByHalves(sums[1]),
            Double::SumByHalves(of_slopes[1])};
  }

  static void RootProducts(const double* poles, const double* origins, const double* shifts, int64_t n, int64_t begin,
                           int64_t end, double* products) {
    const Doubles one = 1.0 - Doubles{};
    for (int64_t i = begin; i < end; i += kDoubles) {
      Doubles pole, product = one;
      Double::Load(poles + i, pole);
      for (int64_t j = 0; j < n; ++j) {
        const Doubles to_root = (pole - origins[j]) - shifts[j];
        Doubles to_pole = pole - poles[j];
        to_pole = to_pole == 0.0 ? one : to_pole;
        product *= to_root / to_pole;
      }
      Double::Store(product, products + i);
    }
  }

  static void SecularVectors(const double* poles, const double* z, int64_t n, const double* origins,
                             const double* shifts, int64_t count, int64_t width, T* to) {
    constexpr int64_t most = 32;
    double lengths[most] = {}, origin[most] = {}, shift[most] = {};
    for (int64_t r = 0; r < width; ++r) {
      // Behind the last root any finite number: the column is zeroed below.
      origin[r] = origins[r < count ? r : count - 1];
      shift[r] = shifts[r < count ? r : count - 1];
    }
    for (int64_t i = 0; i < n; ++i)
      for (int64_t r = 0; r < width; ++r) {
        const double entry = z[i] / ((poles[i] - origin[r]) - shift[r]);
        lengths[r] += entry * entry;
        to[i * width + r] = static_cast<T>(entry);
      }
    T factors[most];
    for (int64_t r = 0; r < width; ++r) factors[r] = r < count ? static_cast<T>(1 / std::sqrt(lengths[r])) : T(0);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t r = 0; r < width; ++r) to[i * width + r] *= factors[r];
  }

  static constexpr FactorizationKernels<T> kKernels = {SymmetricRows, Dots,   AddRows, AddOuter,     Squares,
                                                       Scale,         Rotate, Secular, RootProducts, SecularVectors};
};

}  // namespace curvax
