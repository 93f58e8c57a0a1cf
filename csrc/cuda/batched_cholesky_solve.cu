// XLA FFI handler of batched_cholesky_solve on NVIDIA GPUs: operands and results as on the CPU, and systems of at most
// 128 unknowns.

#include <cstdint>
#include <limits>

#include "common/batched_operands.h"
#include "cuda/batched.h"
#include "cuda/batched_cholesky_solve.cuh"
#include "cuda/launch.h"

namespace curvax {
namespace {

template <typename T, typename Element>
ffi::Error RunCholesky(cudaStream_t stream, const CholeskyCall& call) {
  const char* op = "batched_cholesky_solve";
  const Dims& shape = call.matrices.operand.dims;
  if (call.systems > std::numeric_limits<int32_t>::max())
    return Refuse(op, Name(call.dtype), Shape(shape), " has ", call.systems, " systems, and a CUDA grid at most ",
                  std::numeric_limits<int32_t>::max(), " blocks: split the batch");
  CholeskyArguments<T> a = {};
  a.matrices = call.matrices.operand.data;
  a.rhs = Data<T>(call.rhs.operand);
  a.damping = Data<T>(call.damping.operand);
  a.of_matrices = call.matrices.broadcast;
  a.of_rhs = call.rhs.broadcast;
  a.of_damping = call.damping.broadcast;
  a.value = Data<T>(call.value);
  a.residual = Data<T>(call.residual);
  a.result = Data<int32_t>(call.result);
  a.iterations = Data<int32_t>(call.iterations);
  a.n = static_cast<int>(call.n);
  const auto kernel = BatchedCholeskySolveKernel<T, Element>;
  const int64_t bytes = CholeskyShared<T>::Bytes(a.n);
  // More than what a block gets without asking.
  if (bytes > 48 << 10) {
    const auto status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (auto error = CheckLaunch(op, call.dtype, shape, status); error.failure()) return error;
  }
  kernel<<<dim3(static_cast<unsigned>(call.systems)), dim3(kCholeskyThreads), bytes, stream>>>(a);
  return CheckLaunch(op, call.dtype, shape, cudaGetLastError());
}

ffi::Error BatchedCholeskySolve(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  CholeskyCall call;
  if (auto error = ReadCholesky(args, rets, call); error.failure()) return error;
  if (call.n > kCholeskyThreads)
    return Refuse("batched_cholesky_solve", "systems of ", call.n, " unknowns do not fit in shared memory: at most ",
                  kCholeskyThreads, "; use the reference");
  if (call.systems == 0) return ffi::Error::Success();
  if (call.dtype == ffi::DataType::F64) return RunCholesky<double, double>(stream, call);
  return call.narrow ? RunCholesky<float, uint16_t>(stream, call) : RunCholesky<float, float>(stream, call);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(BatchedCholeskySolveCudaHandler, BatchedCholeskySolve,
                              ffi::Ffi::Bind().Ctx<Stream>().RemainingArgs().RemainingRets(), {kGraphSafe});

}  // namespace curvax
