#include "cpu/linalg/handlers.h"

#include <algorithm>
#include <cstdint>

#include "common/operands.h"
#include "cpu/linalg/eigh.h"
#include "cpu/linalg/workers.h"

namespace curvax {
namespace {

// A thread takes runs of neighbouring matrices: this many runs per thread balance the load.
constexpr int64_t kRunsPerThread = 8;
// Below this many multiply-adds in a call one thread is faster than waking another.
constexpr int64_t kThreadingWork = 1 << 19;
// Matrices of more multiply-adds than this are worth the threads that other matrices leave idle.
constexpr int64_t kSharedWork = 1 << 22;

// Matrices (..., rows, columns).
struct Stack {
  ffi::DataType dtype;
  Dims batch;
  int64_t count = 0, rows = 0, columns = 0;
};

ffi::Error ReadStack(const char* op, const Operand& matrices, Stack& stack) {
  if (auto error = CheckDtype(op, matrices.dtype); error.failure()) return error;
  const Dims& dims = matrices.dims;
  if (dims.size() < 2) return Refuse(op, "operand 0 has shape ", Shape(dims), ", expected (..., rows, columns)");
  stack.dtype = matrices.dtype;
  stack.batch = Dims(dims.begin(), dims.end() - 2);
  stack.count = Product(stack.batch);
  stack.rows = dims[dims.size() - 2];
  stack.columns = dims.back();
  return ffi::Error::Success();
}

Dims With(const Dims& batch, std::initializer_list<int64_t> own) {
  Dims dims = batch;
  dims.insert(dims.end(), own);
  return dims;
}

// The results of a handler, each checked against its dtype and shape.
ffi::Error ReadResult(const char* op, ffi::RemainingRets rets, size_t index, ffi::DataType dtype, const Dims& dims,
                      Operand& operand) {
  if (auto error = Result(op, rets, index, operand); error.failure()) return error;
  return CheckSame(op, "result", index, operand, dtype, dims);
}

// Calls body(workers, begin, end) for runs of matrices, each of `work` multiply-adds: on all threads where there are
// enough of them, and with all threads inside a matrix where it is large.
template <typename Body>
void ForEachRun(ffi::ThreadPool& pool, int64_t threads, int64_t count, int64_t work, const Body& body) {
  if (threads <= 0) threads = count * work < kThreadingWork ? 1 : std::max<int64_t>(1, pool.num_threads());
  const int64_t run = std::max<int64_t>(1, threads == 1 ? count : count / (threads * kRunsPerThread));
  const Workers inside = {pool, work < kSharedWork ? 1 : threads};
  ParallelFor(pool, threads, (count + run - 1) / run,
              [&](int64_t piece) { body(inside, piece * run, std::min(count, (piece + 1) * run)); });
}

// ------------------------------------------------------------------------------------------------------------- eigh

template <typename T>
void RunEigh(ffi::ThreadPool& pool, int64_t threads, const Stack& stack, const Operand& matrices,
             const Operand (&results)[3]) {
  const int64_t n = stack.rows;
  ForEachRun(pool, threads, stack.count, 4 * n * n * n, [&](const Workers& workers, int64_t begin, int64_t end) {
    Eigh<T> solver(workers, n);
    for (int64_t i = begin; i < end; ++i)
      Data<int32_t>(results[2])[i] = solver.Solve(Data<T>(matrices) + i * n * n, Data<T>(results[0]) + i * n,
                                                  Data<T>(results[1]) + i * n * n);
  });
}

ffi::Error EighOf(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets, int64_t threads) {
  constexpr const char* op = "eigh";
  if (args.size() != 1 || rets.size() != 3)
    return Refuse(op, "got ", args.size(), " operands and ", rets.size(), " results, expected 1 and 3");
  Operand matrices, results[3];
  Stack stack;
  if (auto error = Argument(op, args, 0, matrices); error.failure()) return error;
  if (auto error = ReadStack(op, matrices, stack); error.failure()) return error;
  if (stack.rows != stack.columns)
    return Refuse(op, "operand 0 has shape ", Shape(matrices.dims), ", expected square matrices");
  const int64_t n = stack.rows;
  const Dims shapes[3] = {With(stack.batch, {n}), With(stack.batch, {n, n}), stack.batch};
  for (size_t k = 0; k < 3; ++k) {
    const ffi::DataType dtype = k == 2 ? ffi::DataType::S32 : stack.dtype;
    if (auto error = ReadResult(op, rets, k, dtype, shapes[k], results[k]); error.failure()) return error;
  }
  if (stack.dtype == ffi::DataType::F32)
    RunEigh<float>(pool, threads, stack, matrices, results);
  else
    RunEigh<double>(pool, threads, stack, matrices, results);
  return ffi::Error::Success();
}

}  // namespace

// `threads`: 0 lets the handler decide; a positive number is taken as it is.
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    EighHandler, EighOf,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets().Attr<int64_t>("threads"));

}  // namespace curvax
