#include "cpu/batched.h"

#include <cmath>

#include "common/batched_cg.h"
#include "common/vector.h"
#include "cpu/simd.h"

namespace curvax {
namespace {

#define CURVAX_BODY "cpu/batched.inc"
#include "cpu/levels.inc"

}  // namespace

template <typename T>
const SystemKernels<T>& KernelsOfSystems() {
#if defined(__x86_64__)
  switch (ChosenLevel()) {
    case Level::kAvx512f:
      return avx512f::kSystems<T>;
    case Level::kAvx2:
      return avx2::kSystems<T>;
    case Level::kBaseline:
      break;
  }
#endif
  return baseline::kSystems<T>;
}

template const SystemKernels<float>& KernelsOfSystems<float>();
template const SystemKernels<double>& KernelsOfSystems<double>();

}  // namespace curvax
