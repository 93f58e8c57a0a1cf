#if defined(__x86_64__)

#include "cpu/simd/portable_includes.h"
//
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#include "cpu/simd/compile_kernels.h"

namespace curvax {

template const KernelSet<float>& KernelsCompiledFor<Avx2, float>();
template const KernelSet<double>& KernelsCompiledFor<Avx2, double>();

}  // namespace curvax

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // defined(__x86_64__)
