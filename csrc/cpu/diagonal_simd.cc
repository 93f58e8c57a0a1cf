#include "cpu/diagonal_simd.h"

#include <string_view>

#include "cpu/simd.h"

namespace curvax {
namespace {
#define CURVAX_BODY "cpu/diagonal_blocks.inc"
#include "cpu/levels.inc"

}  // namespace

template <typename T>
const DiagonalKernels<T>& DiagonalKernelsHere() {
#if defined(__x86_64__)
  static const std::string_view level = SimdLevel();
  if (level == "avx512f") return avx512f::kDiagonal<T>;
  if (level == "avx2") return avx2::kDiagonal<T>;
#endif
  return baseline::kDiagonal<T>;
}

template const DiagonalKernels<float>& DiagonalKernelsHere<float>();
template const DiagonalKernels<double>& DiagonalKernelsHere<double>();

}  // namespace curvax
