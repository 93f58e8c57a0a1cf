#include "cpu/simd/portable_includes.h"
//
#include "cpu/simd/compile_kernels.h"

namespace curvax {

template const KernelSet<float>& KernelsCompiledFor<Baseline, float>();
template const KernelSet<double>& KernelsCompiledFor<Baseline, double>();

}  // namespace curvax
