// Products of packed matrices and the triangular work of a Cholesky factor: what gram_accumulate and the dense
// factorizations are made of.
//
// A panel holds `panel` rows of a matrix with entry k of all of them side by side: (row r, entry k) is at
// k * panel + r. One packing serves both sides of a product X Y^T: of Y a whole panel fills vectors, of X `strip` rows,
// which begin anywhere in a panel, are its scalars. With AVX-512, float, panel = 32 and strip = 8:
//
//                     memory ->                                     sums, in registers (strip x panel)
//   X   entry 0   [ 0 .. 7 | 8 .. 15 | ... 31 ]                          0 ......... 31   rows of Y
//       entry 1   [ 0 .. 7 | 8 .. 15 | ... 31 ]                     0  [ s . . . . . . ]
//       ...         `strip` scalars of entry k                      .  [ . . . . . . . ]  += x_k y_k^T for each entry k
//   Y   entry 0   [ 0 .................... 31 ]                     7  [ . . . . . . . ]
//       ...         two vectors of entry k                         rows of X
//
// Rounding: a sum of `depth` products is made in the dtype itself, in order, at most kDepth at a time, and the parts
// are added: it is off by at most kDepth + depth / kDepth roundings of the sum of magnitudes, as in any blocked
// product.
#pragma once

#include <cstdint>

namespace curvax {

// Products added up in one go; a panel of so many entries is 32 KiB, the first-level cache of most processors.
inline constexpr int64_t kDepth = 256;

// No instruction set has larger strips and panels.
inline constexpr int64_t kLargestStrip = 8;
inline constexpr int64_t kLargestPanel = 32;

// Whole panels that together have about so many rows are a block column of a Cholesky factor.
inline constexpr int64_t kBlockRows = 128;

template <typename T>
struct PanelKernels {
  int64_t panel;
  int64_t strip;     // divides panel
  int64_t unknowns;  // from which a system is solved faster in panels than by cpu/simd/small_cholesky.h, on one thread

  // sums (strip x panel) = X Y^T for `depth` entries of a strip and a panel.
  void (*product)(const T* left, const T* right, int64_t depth, T* sums);

  // to = from + (X Y^T) * scales for the first `rows` of a strip and `width` entries of a panel; rows of `from` and
  // `to` are `stride` apart, and each has scales of its own. No `from` counts as zeros, no `scales` as ones.
  void (*accumulate)(const T* left, const T* right, int64_t depth, const T* const* scales, const T* from, T* to,
                     int64_t stride, int64_t rows, int64_t width);

  // c (strip x panel, a piece of a panel) -= X Y^T.
  void (*subtract)(const T* left, const T* right, int64_t depth, T* c);

  // The same, and then c = L^-1 c with the strip x strip lower triangle whose columns begin at `triangle`, a panel
  // apart; `inverse` has one over its diagonal.
  void (*subtract_and_solve)(const T* left, const T* right, int64_t depth, const T* triangle, const T* inverse, T* c);

  // Columns [column, column + strip) of the panel whose own rows begin at entry `first`: less the products of entries
  // [from, column) of its rows, then factorized. Zeros stand above the diagonal; `inverse` gets one over the diagonal.
  // False where a pivot is not above `least` (both by entry).
  bool (*factorize)(T* rows, int64_t first, int64_t from, int64_t column, const T* least, T* inverse);

  // y = L^-1 y and y = L^-T y, one panel of L and its entries of y at a time: those before it are known, or get their
  // share of it.
  void (*forward)(const T* rows, int64_t first, const T* inverse, T* y);
  void (*backward)(const T* rows, int64_t first, const T* inverse, T* y);
};

}  // namespace curvax
