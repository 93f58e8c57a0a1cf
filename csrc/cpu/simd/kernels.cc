#include "cpu/simd/kernels.h"

#include "cpu/simd/instruction_set.h"

namespace curvax {

template <typename T>
const KernelSet<T>& Kernels() {
#if defined(__x86_64__)
  switch (ChosenLevel()) {
    case Level::kAvx512f:
      return KernelsCompiledFor<Avx512f, T>();
    case Level::kAvx2:
      return KernelsCompiledFor<Avx2, T>();
    case Level::kBaseline:
      break;
  }
#endif
  return KernelsCompiledFor<Baseline, T>();
}

template const KernelSet<float>& Kernels<float>();
template const KernelSet<double>& Kernels<double>();

}  // namespace curvax
