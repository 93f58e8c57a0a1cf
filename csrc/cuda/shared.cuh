// The dynamic shared memory of a kernel, by one name on a GPU and under tests/cpp/cuda_emulator.h.
#pragma once

namespace curvax {

// The first of the launch's shared bytes, aligned to 128.
__device__ __forceinline__ char* DynamicShared() {
#if defined(CURVAX_CUDA_EMULATOR)
  return emulator::dynamic_shared;
#else
  extern __shared__ __align__(128) char curvax_shared[];
  return curvax_shared;
#endif
}

}  // namespace curvax
