// The kernels of every instruction set that this processor has.
#pragma once

#include <vector>

#include "cpu/simd/instruction_set.h"
#include "cpu/simd/kernels.h"

namespace curvax {

template <typename T>
struct CompiledLevel {
  const char* name;
  const KernelSet<T>& kernels;
};

template <typename T>
std::vector<CompiledLevel<T>> Levels() {
  std::vector<CompiledLevel<T>> levels = {{"baseline", KernelsCompiledFor<Baseline, T>()}};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    levels.push_back({"avx2", KernelsCompiledFor<Avx2, T>()});
  if (__builtin_cpu_supports("avx512f")) levels.push_back({"avx512f", KernelsCompiledFor<Avx512f, T>()});
#endif
  return levels;
}

}  // namespace curvax
