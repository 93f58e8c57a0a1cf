// XLA FFI handler of batched_cg on NVIDIA GPUs: operands and results as on the CPU, and systems of at most 256 unknowns
// (128 in float64), which is what a multiprocessor holds.

#include <cstdint>
#include <limits>

#include "common/batched_operands.h"
#include "cuda/batched.h"
#include "cuda/batched_cg.cuh"
#include "cuda/launch.h"

namespace curvax {
namespace {

template <typename T>
CgArguments<T> ArgumentsOf(const CgCall& call) {
  CgArguments<T> a = {};
  a.matrices = call.matrices.operand.data;
  a.rhs = Data<T>(call.rhs.operand);
  a.rtol = Data<T>(call.rtol.operand);
  a.maxiter = Data<int32_t>(call.maxiter.operand);
  a.start = call.has_start ? Data<T>(call.start.operand) : nullptr;
  a.inverse = call.has_inverse ? Data<T>(call.inverse.operand) : nullptr;
  a.of_matrices = call.matrices.broadcast;
  a.of_rhs = call.rhs.broadcast;
  a.of_rtol = call.rtol.broadcast;
  a.of_maxiter = call.maxiter.broadcast;
  a.of_start = call.start.broadcast;
  a.of_inverse = call.inverse.broadcast;
  a.value = Data<T>(call.value);
  a.result = Data<int32_t>(call.result);
  a.iterations = Data<int32_t>(call.iterations);
  a.residual = Data<T>(call.residual);
  a.n = static_cast<int>(call.n);
  return a;
}

template <typename T, typename Element, typename Spread>
ffi::Error LaunchCg(cudaStream_t stream, const CgCall& call) {
  constexpr int64_t bytes = CgShared<T, Spread>::kBytes;
  const auto kernel = BatchedCgKernel<T, Element, Spread>;
  const Dims& shape = call.matrices.operand.dims;
  if (call.systems > std::numeric_limits<int32_t>::max())
    return Refuse("batched_cg", Name(call.dtype), Shape(shape), " has ", call.systems,
                  " systems, and a CUDA grid at most ", std::numeric_limits<int32_t>::max(),
                  " blocks: split the batch");
  // What a block gets without asking.
  if constexpr (bytes > 48 << 10) {
    const auto status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (auto error = CheckLaunch("batched_cg", call.dtype, shape, status); error.failure()) return error;
  }
  kernel<<<dim3(static_cast<unsigned>(call.systems)), dim3(Spread::kThreads), bytes, stream>>>(ArgumentsOf<T>(call));
  return CheckLaunch("batched_cg", call.dtype, shape, cudaGetLastError());
}

// Spreads that need no more registers than a thread has: unknowns, threads for each, entries of each in shared memory.
template <typename Element>
ffi::Error RunFloat(cudaStream_t stream, const CgCall& call) {
  if (call.n <= 16) return LaunchCg<float, Element, Spread<16, 2, 0>>(stream, call);
  if (call.n <= 32) return LaunchCg<float, Element, Spread<32, 1, 0>>(stream, call);
  if (call.n <= 64) return LaunchCg<float, Element, Spread<64, 2, 0>>(stream, call);
  if (call.n <= 128) return LaunchCg<float, Element, Spread<128, 2, 16>>(stream, call);
  return LaunchCg<float, Element, Spread<256, 2, 80>>(stream, call);
}

ffi::Error RunDouble(cudaStream_t stream, const CgCall& call) {
  if (call.n <= 16) return LaunchCg<double, double, Spread<16, 2, 0>>(stream, call);
  if (call.n <= 32) return LaunchCg<double, double, Spread<32, 2, 0>>(stream, call);
  if (call.n <= 64) return LaunchCg<double, double, Spread<64, 4, 0>>(stream, call);
  return LaunchCg<double, double, Spread<128, 2, 0>>(stream, call);
}

ffi::Error BatchedCg(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets rets, int64_t start,
                     int64_t inverse) {
  CgCall call;
  if (auto error = ReadCg(args, rets, start, inverse, call); error.failure()) return error;
  const bool wide = call.dtype == ffi::DataType::F64;
  if (call.n > (wide ? 128 : 256))
    return Refuse("batched_cg", "systems of ", call.n, " unknowns in ", Name(call.dtype),
                  " do not fit on a multiprocessor: use the reference");
  if (call.systems == 0) return ffi::Error::Success();
  if (wide) return RunDouble(stream, call);
  return call.narrow ? RunFloat<uint16_t>(stream, call) : RunFloat<float>(stream, call);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    BatchedCgCudaHandler, BatchedCg,
    ffi::Ffi::Bind().Ctx<Stream>().RemainingArgs().RemainingRets().Attr<int64_t>("start").Attr<int64_t>("inverse"),
    {kGraphSafe});

}  // namespace curvax
