#include "cpu/batched.h"

#include <cmath>

#include "common/batched_cg.h"
#include "common/vector.h"
#include "cpu/simd.h"

namespace curvax {
namespace {

// 16 registers of 16 bytes, 4 to a vector.
#define CURVAX_LEVEL baseline
#define CURVAX_TARGET
#define CURVAX_ROWS 1
#define CURVAX_SPLITS 2
#include "cpu/batched.inc"

#if defined(__x86_64__)
// 16 registers of 32 bytes, 2 to a vector.
#define CURVAX_LEVEL avx2
#define CURVAX_TARGET __attribute__((target("avx2,fma")))
#define CURVAX_ROWS 2
#define CURVAX_SPLITS 2
#include "cpu/batched.inc"

// 32 registers of 64 bytes.
#define CURVAX_LEVEL avx512f
#define CURVAX_TARGET __attribute__((target("avx512f,fma")))
#define CURVAX_ROWS 8
#define CURVAX_SPLITS 2
#include "cpu/batched.inc"
#endif

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
