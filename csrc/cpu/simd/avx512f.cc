#if defined(__x86_64__)

#include "cpu/simd/portable_includes.h"
//
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,fma")
#endif
#include "cpu/simd/compile_kernels.h"

namespace curvax {

template const KernelSet<float>& KernelsCompiledFor<Avx512f, float>();
template const KernelSet<double>& KernelsCompiledFor<Avx512f, double>();

}  // namespace curvax

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // defined(__x86_64__)
