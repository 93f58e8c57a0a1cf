// Launching kernels from a foreign call: on XLA's stream, checked, without allocation or synchronization, so that XLA
// may record the call into a CUDA graph ("command buffer").
#pragma once

#if !defined(CURVAX_CUDA_EMULATOR)  // tests/cpp/cuda_emulator.h stands for it on a machine without CUDA
#include <cuda_runtime.h>
#endif

#include <cstdint>
#include <limits>
#include <sstream>

#include "common/leaves.h"
#include "common/operands.h"
#include "cuda/reduce.cuh"

namespace curvax {

using Stream = ffi::PlatformStream<cudaStream_t>;

// Every handler launches the same kernels on the same buffers whenever it is called, which lets a graph replay them.
inline constexpr ffi::Traits kGraphSafe = ffi::Traits::kCmdBufferCompatible;

// An error that names the op, what it was called on, and what CUDA said.
inline ffi::Error CheckLaunch(const char* op, ffi::DataType dtype, const Dims& shape, cudaError_t status) {
  if (status == cudaSuccess) return ffi::Error::Success();
  std::ostringstream out;
  out << "curvax " << op << ": the CUDA kernel for " << Name(dtype) << Shape(shape)
      << " was not launched: " << cudaGetErrorName(status) << ", " << cudaGetErrorString(status);
  return ffi::Error::Internal(out.str());
}

// Starts `blocks` blocks of `kernel`, at least one, and says whether CUDA took them.
template <typename... Parameters>
cudaError_t Start(cudaStream_t stream, unsigned blocks, unsigned threads, void (*kernel)(Parameters...),
                  const Parameters&... parameters) {
#if defined(CURVAX_CUDA_EMULATOR)
  (void)stream;
  emulator::Launch(dim3(blocks), dim3(threads), 0, [&] { kernel(parameters...); });
  return cudaGetLastError();
#else
  void* addresses[] = {const_cast<void*>(static_cast<const void*>(&parameters))...};
  return cudaLaunchKernel(kernel, dim3(blocks), dim3(threads), addresses, 0, stream);
#endif
}

// Launches `kernel` over a grid of `blocks` blocks in x; a grid of none is no launch. `shape` is for the error alone.
template <typename... Parameters, typename... Arguments>
ffi::Error Launch(const char* op, ffi::DataType dtype, const Dims& shape, cudaStream_t stream, int64_t blocks,
                  int threads, void (*kernel)(Parameters...), const Arguments&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments));
  if (blocks == 0) return ffi::Error::Success();
  if (blocks > std::numeric_limits<int32_t>::max())
    return Refuse(op, Name(dtype), Shape(shape), " needs ", blocks, " thread blocks, and a CUDA grid has at most ",
                  std::numeric_limits<int32_t>::max(), ": split the batch");
  return CheckLaunch(op, dtype, shape,
                     Start<Parameters...>(stream, static_cast<unsigned>(blocks), static_cast<unsigned>(threads), kernel,
                                          arguments...));
}

// The last stage of sums over all leaves (cuda/reduce.cuh): `partial` has one term per result, batch member and block.
// Without blocks the sums are 0.
template <typename T, int kResults>
ffi::Error LaunchSums(const char* op, const Layout& layout, cudaStream_t stream, const double* partial,
                      const Sums<T, kResults>& sums) {
  return Launch(op, layout.dtype, layout.batch_dims, stream, kResults * layout.batch, kSumThreads, SumRows<T, kResults>,
                partial, layout.blocks(), static_cast<int>(layout.batch), sums);
}

}  // namespace curvax
