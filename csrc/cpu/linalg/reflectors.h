// Blocks of Householder reflectors H = I - tau v v^T, applied to panels of columns.
#pragma once

#include <cstdint>

#include "cpu/scratch.h"
#include "cpu/simd/kernels.h"

namespace curvax {

// Most reflectors of a block: their product is made of matrix products this deep.
inline constexpr int64_t kReflectors = 64;

// The reflector that takes a vector to a multiple of one of its entries, the pivot.
template <typename T>
struct Reflector {
  T tau;      // 0 where there is nothing to do
  T beta;     // what the pivot becomes
  T inverse;  // one over the pivot less beta: v is the vector times this, and 1 at the pivot
};

// From the pivot and the sum of squares of the other entries.
template <typename T>
Reflector<T> MakeReflector(T pivot, double others);

// x -> H_(count-1) ... H_0 x for vectors of `length` entries, as x - V^T M V x with the reflectors' v in the rows of V
// and M lower triangular (Schreiber and Van Loan 1989).
//
// A panel holds `width` vectors with entry k of all of them side by side (cpu/simd/panel_kernels.h), and has
// Padded(length) entries or more; what stands behind `length` must be finite and stays.
template <typename T>
class ReflectorBlock {
 public:
  // Room for `most` reflectors of up to `length` entries.
  ReflectorBlock(int64_t most, int64_t length);

  // Reflectors in rows of Padded(length) entries `stride` apart, each with a one at its pivot and zeros where it has
  // no entries, and their tau.
  void Set(const T* rows, int64_t stride, int64_t count, int64_t length, const T* tau);

  // The panel's vectors become H_(count-1) ... H_0 x, or H_0 ... H_(count-1) x with `reversed`. `scratch` has
  // 2 * kReflectors * width entries.
  void Apply(T* panel, bool reversed, T* scratch) const;

 private:
  void SetTriangle(const T* rows, int64_t stride, const T* tau);
  // sums = X y for the `rows` rows of X, packed in panels with `depth` entries each.
  void Product(const T* packed, int64_t rows, int64_t depth, const T* y, T* sums) const;

  const PanelKernels<T>& kernels_;
  const int64_t width_;
  int64_t count_ = 0, length_ = 0;
  Scratch<T> down_;      // V packed by reflectors: the left operand of V x
  Scratch<T> up_;        // V packed by entries: the left operand of V^T y
  Scratch<T> triangle_;  // M and M^T, packed
};

}  // namespace curvax
