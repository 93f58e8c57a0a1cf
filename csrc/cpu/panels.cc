#include "cpu/panels.h"

#include <cmath>

#include "common/batched_cg.h"
#include "common/vector.h"
#include "cpu/simd.h"

namespace curvax {
namespace {

// 16 registers of 16 bytes; a product takes one besides.
#define CURVAX_LEVEL baseline
#define CURVAX_TARGET
#define CURVAX_BYTES 16
#define CURVAX_VECTORS 2
#define CURVAX_STRIP 4
#define CURVAX_UNKNOWNS 128
#include "cpu/panels.inc"

#if defined(__x86_64__)
// 16 registers of 32 bytes: 12 sums, 3 vectors and a scalar.
#define CURVAX_LEVEL avx2
#define CURVAX_TARGET __attribute__((target("avx2,fma")))
#define CURVAX_BYTES 32
#define CURVAX_VECTORS 3
#define CURVAX_STRIP 4
#define CURVAX_UNKNOWNS 48
#include "cpu/panels.inc"

// 32 registers of 64 bytes: 16 sums keep two units of a latency of 4 busy twice over.
#define CURVAX_LEVEL avx512f
#define CURVAX_TARGET __attribute__((target("avx512f,fma")))
#define CURVAX_BYTES 64
#define CURVAX_VECTORS 2
#define CURVAX_STRIP 8
#define CURVAX_UNKNOWNS 256
#include "cpu/panels.inc"
#endif

}  // namespace

template <typename T>
const PanelKernels<T>& KernelsOfPanels() {
#if defined(__x86_64__)
  switch (ChosenLevel()) {
    case Level::kAvx512f:
      return avx512f::kPanels<T>;
    case Level::kAvx2:
      return avx2::kPanels<T>;
    case Level::kBaseline:
      break;
  }
#endif
  return baseline::kPanels<T>;
}

template const PanelKernels<float>& KernelsOfPanels<float>();
template const PanelKernels<double>& KernelsOfPanels<double>();

}  // namespace curvax
