// The vector loops of the dense factorizations that are no products of panels (cpu/simd/panel_kernels.h).
//
// Rows begin at multiples of kWideEntries entries and have zeros behind their end, so that no loop has a remainder:
// lengths are rounded up (cpu/simd/padding.h).
#pragma once

#include <cstdint>

namespace curvax {

// f(x) - 1 / rho of the secular equation 1 / rho + sum_i squares_i / (pole_i - x) = 0, in two parts: poles before the
// root, poles behind it.
struct SecularSums {
  double before, before_slope, behind, behind_slope;
};

template <typename T>
struct FactorizationKernels {
  // y += A x for the symmetric matrix whose lower triangle is in rows [begin, end) of `a`, zeros above the diagonal:
  // each entry is read once and counts for both triangles. `begin` is a multiple of four.
  void (*symmetric_rows)(const T* a, int64_t stride, int64_t begin, int64_t end, const T* x, T* y);

  // sums[r] = row_r . x, and y += sum_r factors[r] row_r, for rows of n entries `stride` apart.
  void (*dots)(const T* rows, int64_t stride, int64_t count, int64_t n, const T* x, T* sums);
  void (*add_rows)(const T* rows, int64_t stride, int64_t count, int64_t n, const T* factors, T* y);

  // row_r += factors[r] x.
  void (*add_outer)(const T* factors, const T* x, int64_t count, int64_t n, T* rows, int64_t stride);

  // |x|^2 in double, and y = scale x.
  double (*squares)(const T* x, int64_t n);
  void (*scale)(T factor, const T* x, int64_t n, T* y);

  // (a, b) = (c a + s b, c b - s a).
  void (*rotate)(T c, T s, T* a, T* b, int64_t n);

  // Poles [0, split) stand before the root, [split, n) behind it; x is given as origin + shift, with origin a pole:
  // pole_i - x = (pole_i - origin) - shift loses nothing.
  SecularSums (*secular)(const double* poles, const double* squares, int64_t split, int64_t n, double origin,
                         double shift);

  // products[i] = prod_j (pole_i - root_j) / (pole_i - pole_j) over j in [0, n) but i in the denominator, for i in
  // [begin, end); root_j is origin_j + shift_j.
  void (*root_products)(const double* poles, const double* origins, const double* shifts, int64_t n, int64_t begin,
                        int64_t end, double* products);

  // to[i][r] = z_i / (pole_i - root_r), divided by the length of that column, for `count` roots side by side; `width`
  // of them, whole vectors, zeros behind `count`.
  void (*secular_vectors)(const double* poles, const double* z, int64_t n, const double* origins, const double* shifts,
                          int64_t count, int64_t width, T* to);
};

}  // namespace curvax
