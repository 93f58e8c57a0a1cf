#include "cpu/linalg/loops.h"

#include <algorithm>
#include <cmath>

#include "cpu/simd.h"

namespace curvax {
namespace {

#define CURVAX_BODY "cpu/linalg/loops.inc"
#include "cpu/levels.inc"

}  // namespace

template <typename T>
const LoopKernels<T>& Loops() {
#if defined(__x86_64__)
  switch (ChosenLevel()) {
    case Level::kAvx512f:
      return avx512f::kLoops<T>;
    case Level::kAvx2:
      return avx2::kLoops<T>;
    case Level::kBaseline:
      break;
  }
#endif
  return baseline::kLoops<T>;
}

template const LoopKernels<float>& Loops<float>();
template const LoopKernels<double>& Loops<double>();

}  // namespace curvax
