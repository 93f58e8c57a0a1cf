#include "cpu/panels.h"

#include <cmath>

#include "common/batched_cg.h"
#include "common/vector.h"
#include "cpu/simd.h"

namespace curvax {
namespace {

#define CURVAX_BODY "cpu/panels.inc"
#include "cpu/levels.inc"

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
