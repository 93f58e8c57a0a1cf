// The steps of a Cholesky factorization A = L L^T in panels, and of solving with it. A panel has `panel` rows of L,
// each `kStrip` columns at a time:
//
//          from    column
//           |        |
//   [ l l l l l l l l | c c c c |           ]   rows of a panel
//     given to the caller's Subtract, at most kDepth entries at a time, and then
//   1. Rest                 c -= (entries [from, column) of the rows) (the same of the strip's own rows)^T
//   2. on the diagonal      FactorizeStrip: column by column, over the root of its pivot
//      below the diagonal   SubtractAndSolve: c = c (strip's triangle)^-T, column by column
#pragma once

#include <cmath>
#include <cstdint>

#include "common/batched_cg.h"
#include "common/vector.h"
#include "cpu/simd/panel_kernels.h"
#include "cpu/simd/panel_products.h"

namespace curvax {

template <typename Isa, typename T>
struct PanelTriangles : PanelProducts<Isa, T> {
  using Base = PanelProducts<Isa, T>;
  using Base::Accumulate;
  using Base::kLeastUnknowns;
  using Base::kPanel;
  using Base::kStrip;
  using Base::kVectors;
  using Base::kWidth;
  using Base::Load;
  using Base::Multiply;
  using Base::Store;
  using Base::SumByHalves;
  using Base::Sums;
  using typename Base::V;

  // c - X Y^T, in registers. One piece of kDepth at a time is the caller's business.
  static CURVAX_INLINE void Rest(const T* left, const T* right, int64_t depth, const T* c,
                                 V (&rest)[kStrip][kVectors]) {
    Sums(left, right, depth, rest);
#pragma GCC unroll 8
    for (int s = 0; s < kStrip; ++s)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        V before;
        Load(c + s * kPanel + v * kWidth, before);
        rest[s][v] = before - rest[s][v];
      }
  }

  static void Subtract(const T* left, const T* right, int64_t depth, T* c) {
    V rest[kStrip][kVectors];
    Rest(left, right, depth, c, rest);
#pragma GCC unroll 8
    for (int s = 0; s < kStrip; ++s)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) Store(rest[s][v], c + s * kPanel + v * kWidth);
  }

  static void SubtractAndSolve(const T* left, const T* right, int64_t depth, const T* triangle, const T* inverse,
                               T* c) {
    V rest[kStrip][kVectors];
    Rest(left, right, depth, c, rest);
#pragma GCC unroll 8
    for (int s = 0; s < kStrip; ++s) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) rest[s][v] = rest[s][v] * inverse[s];
#pragma GCC unroll 8
      for (int below = s + 1; below < kStrip; ++below) {
        const V factor = triangle[s * kPanel + below] - V{};
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) rest[below][v] -= factor * rest[s][v];
      }
    }
#pragma GCC unroll 8
    for (int s = 0; s < kStrip; ++s)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) Store(rest[s][v], c + s * kPanel + v * kWidth);
  }

  static bool FactorizeStrip(T* rows, int64_t first, int64_t from, int64_t column, const T* least, T* inverse) {
    const int64_t offset = column - first;
    T* c = rows + column * kPanel;
    Subtract(rows + from * kPanel + offset, rows + from * kPanel, column - from, c);
    for (int s = 0; s < kStrip; ++s) {
      T* own = c + s * kPanel;
      const T pivot = own[offset + s];
      if (!(pivot > least[column + s]) || !IsFinite(pivot)) return false;
      const T scale = 1 / std::sqrt(pivot);
      inverse[column + s] = scale;
      for (int64_t r = 0; r < offset + s; ++r) own[r] = 0;
      V mine[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        Load(own + v * kWidth, mine[v]);
        mine[v] = mine[v] * scale;
        Store(mine[v], own + v * kWidth);
      }
      for (int below = s + 1; below < kStrip; ++below) {
        T* theirs = c + below * kPanel;
        const V factor = own[offset + below] - V{};
        for (int v = 0; v < kVectors; ++v) {
          V rest;
          Load(theirs + v * kWidth, rest);
          rest -= factor * mine[v];
          Store(rest, theirs + v * kWidth);
        }
      }
    }
    return true;
  }

  static void Forward(const T* rows, int64_t first, const T* inverse, T* y) {
    constexpr int chains = 4;  // hide the latency of an addition
    // 1. The panel's entries of y less the products with all unknowns before them.
    V sums[chains][kVectors] = {};
    int64_t k = 0;
    for (; k + chains <= first; k += chains)
#pragma GCC unroll 4
      for (int chain = 0; chain < chains; ++chain) {
        const V known = y[k + chain] - V{};
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          V entry;
          Load(rows + (k + chain) * kPanel + v * kWidth, entry);
          AddProduct(known, entry, sums[chain][v]);
        }
      }
    // Panels begin at multiples of four entries: nothing is left.
    T* own = y + first;
    V rest[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      Load(own + v * kWidth, rest[v]);
      rest[v] -= (sums[0][v] + sums[1][v]) + (sums[2][v] + sums[3][v]);
      Store(rest[v], own + v * kWidth);
    }
    // 2. The panel's own unknowns, from the first down.
    for (int64_t s = 0; s < kPanel; ++s) {
      const T solution = own[s] * inverse[first + s];
      const T* column = rows + (first + s) * kPanel;
      for (int v = 0; v < kVectors; ++v) {
        V entry;
        Load(column + v * kWidth, entry);
        rest[v] -= entry * solution;
        Store(rest[v], own + v * kWidth);
      }
      own[s] = solution;
      // Its lane has ended: what the later columns have there are zeros, so it stays what is stored.
      for (int v = 0; v < kVectors; ++v) Load(own + v * kWidth, rest[v]);
    }
  }

  // The inner product of entry `entry` of a panel's rows with the panel's unknowns.
  static CURVAX_INLINE T Overlap(const T* rows, int64_t entry, const V (&unknowns)[kVectors]) {
    const T* column = rows + entry * kPanel;
    V sum = {}, value;
    for (int v = 0; v < kVectors; ++v) {
      Load(column + v * kWidth, value);
      AddProduct(value, unknowns[v], sum);
    }
    return SumByHalves(sum);
  }

  static void Backward(const T* rows, int64_t first, const T* inverse, T* y) {
    T solution[kPanel] = {};
    V unknowns[kVectors] = {};
    // 1. The panel's own unknowns, from the last up; those that are not known yet count as zero.
    for (int64_t s = kPanel - 1; s >= 0; --s) {
      solution[s] = (y[first + s] - Overlap(rows, first + s, unknowns)) * inverse[first + s];
      for (int v = 0; v < kVectors; ++v) Load(solution + v * kWidth, unknowns[v]);
    }
    for (int64_t s = 0; s < kPanel; ++s) y[first + s] = solution[s];
    // 2. Their share of every entry before them.
    for (int64_t k = 0; k < first; ++k) y[k] -= Overlap(rows, k, unknowns);
  }

  static constexpr PanelKernels<T> kKernels = {kPanel,   kStrip,           kLeastUnknowns, Multiply, Accumulate,
                                               Subtract, SubtractAndSolve, FactorizeStrip, Forward,  Backward};
};

}  // namespace curvax
