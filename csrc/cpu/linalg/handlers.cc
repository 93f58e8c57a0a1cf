#include "cpu/linalg/handlers.h"

#include <algorithm>
#include <cstdint>

#include "common/operands.h"
#include "cpu/large_cholesky.h"
#include "cpu/linalg/eigh.h"
#include "cpu/linalg/qr.h"
#include "cpu/linalg/triangle.h"
#include "cpu/linalg/workers.h"

namespace curvax {
namespace {

// A thread takes runs of neighboring matrices: this many runs per thread balance the load.
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

ffi::Error CheckCounts(const char* op, ffi::RemainingArgs args, ffi::RemainingRets rets, size_t operands,
                       size_t results) {
  if (args.size() == operands && rets.size() == results) return ffi::Error::Success();
  return Refuse(op, "got ", args.size(), " operands and ", rets.size(), " results, expected ", operands, " and ",
                results);
}

ffi::Error ReadSquares(const char* op, ffi::RemainingArgs args, Operand& matrices, Stack& stack) {
  if (auto error = Argument(op, args, 0, matrices); error.failure()) return error;
  if (auto error = ReadStack(op, matrices, stack); error.failure()) return error;
  if (stack.rows == stack.columns) return ffi::Error::Success();
  return Refuse(op, "operand 0 has shape ", Shape(matrices.dims), ", expected square matrices");
}

// --------------------------------------------------------------------------------------------------------- cholesky

template <typename T>
void RunCholesky(ffi::ThreadPool& pool, int64_t threads, const Stack& stack, const Operand& matrices,
                 const Operand& factors, const Operand& ends) {
  const int64_t n = stack.rows;
  ForEachRun(pool, threads, stack.count, n * n * n / 6, [&](const Workers& workers, int64_t begin, int64_t end) {
    LargeCholesky<T> solver(workers, n);
    for (int64_t i = begin; i < end; ++i) {
      solver.Factorize(Data<T>(matrices) + i * n * n, n, T(0), T(0));
      Data<int32_t>(ends)[i] = solver.WriteFactor(Data<T>(factors) + i * n * n);
    }
  });
}

ffi::Error CholeskyOf(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets, int64_t threads) {
  constexpr const char* op = "cholesky";
  Operand matrices, factors, ends;
  Stack stack;
  if (auto error = CheckCounts(op, args, rets, 1, 2); error.failure()) return error;
  if (auto error = ReadSquares(op, args, matrices, stack); error.failure()) return error;
  if (auto error = ReadResult(op, rets, 0, stack.dtype, matrices.dims, factors); error.failure()) return error;
  if (auto error = ReadResult(op, rets, 1, ffi::DataType::S32, stack.batch, ends); error.failure()) return error;
  if (stack.dtype == ffi::DataType::F32)
    RunCholesky<float>(pool, threads, stack, matrices, factors, ends);
  else
    RunCholesky<double>(pool, threads, stack, matrices, factors, ends);
  return ffi::Error::Success();
}

// ------------------------------------------------------------------------------------------------- triangular_solve

template <typename T>
void RunTriangularSolve(ffi::ThreadPool& pool, int64_t threads, const Stack& stack, const Operand& lower,
                        const Operand& rhs, const Operand& value, bool transpose) {
  const int64_t n = stack.rows, columns = rhs.dims.back();
  const int64_t work = n * n * (columns + 1) / 2;
  ForEachRun(pool, threads, stack.count, work, [&](const Workers& workers, int64_t begin, int64_t end) {
    Triangle<T> triangle(n);
    for (int64_t i = begin; i < end; ++i) {
      workers.Of(n * n).For(triangle.panels(),
                            [&](int64_t panel) { triangle.Pack(panel, Data<T>(lower) + i * n * n, n, transpose); });
      TriangularSolve<T>(workers, triangle, Data<T>(rhs) + i * n * columns, columns, transpose,
                         Data<T>(value) + i * n * columns);
    }
  });
}

ffi::Error TriangularSolveOf(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets, int64_t transpose,
                             int64_t threads) {
  constexpr const char* op = "triangular_solve";
  Operand lower, rhs, value;
  Stack stack;
  if (auto error = CheckCounts(op, args, rets, 2, 1); error.failure()) return error;
  if (auto error = ReadSquares(op, args, lower, stack); error.failure()) return error;
  if (auto error = Argument(op, args, 1, rhs); error.failure()) return error;
  if (rhs.dims.size() != lower.dims.size())
    return Refuse(op, "operand 1 has shape ", Shape(rhs.dims), ", expected the axes of ", Shape(lower.dims));
  const Dims dims = With(stack.batch, {stack.rows, rhs.dims.back()});
  if (auto error = CheckSame(op, "operand", 1, rhs, stack.dtype, dims); error.failure()) return error;
  if (auto error = ReadResult(op, rets, 0, stack.dtype, dims, value); error.failure()) return error;
  if (stack.dtype == ffi::DataType::F32)
    RunTriangularSolve<float>(pool, threads, stack, lower, rhs, value, transpose != 0);
  else
    RunTriangularSolve<double>(pool, threads, stack, lower, rhs, value, transpose != 0);
  return ffi::Error::Success();
}

// ------------------------------------------------------------------------------------------------------------- eigh

template <typename T>
void RunEigh(ffi::ThreadPool& pool, int64_t threads, const Stack& stack, const Operand& matrices,
             const Operand (&results)[3]) {
  const int64_t n = stack.rows;
  ForEachRun(pool, threads, stack.count, 4 * n * n * n, [&](const Workers& workers, int64_t begin, int64_t end) {
    Eigh<T> solver(workers, n);
    for (int64_t i = begin; i < end; ++i)
      Data<int32_t>(results[2])[i] =
          solver.Solve(Data<T>(matrices) + i * n * n, Data<T>(results[0]) + i * n, Data<T>(results[1]) + i * n * n);
  });
}

ffi::Error EighOf(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets, int64_t threads) {
  constexpr const char* op = "eigh";
  Operand matrices, results[3];
  Stack stack;
  if (auto error = CheckCounts(op, args, rets, 1, 3); error.failure()) return error;
  if (auto error = ReadSquares(op, args, matrices, stack); error.failure()) return error;
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

// --------------------------------------------------------------------------------------------------------------- qr

template <typename T>
void RunQr(ffi::ThreadPool& pool, int64_t threads, const Stack& stack, const Operand& matrices,
           const Operand (&results)[3]) {
  const int64_t m = stack.rows, n = stack.columns, k = std::min(m, n);
  ForEachRun(pool, threads, stack.count, 3 * m * n * k, [&](const Workers& workers, int64_t begin, int64_t end) {
    Qr<T> solver(workers, m, n);
    for (int64_t i = begin; i < end; ++i)
      Data<int32_t>(results[2])[i] = solver.Factorize(Data<T>(matrices) + i * m * n, Data<T>(results[0]) + i * m * k,
                                                      Data<T>(results[1]) + i * k * n);
  });
}

ffi::Error QrOf(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets, int64_t threads) {
  constexpr const char* op = "qr";
  Operand matrices, results[3];
  Stack stack;
  if (auto error = CheckCounts(op, args, rets, 1, 3); error.failure()) return error;
  if (auto error = Argument(op, args, 0, matrices); error.failure()) return error;
  if (auto error = ReadStack(op, matrices, stack); error.failure()) return error;
  const int64_t m = stack.rows, n = stack.columns, k = std::min(m, n);
  const Dims shapes[3] = {With(stack.batch, {m, k}), With(stack.batch, {k, n}), stack.batch};
  for (size_t r = 0; r < 3; ++r) {
    const ffi::DataType dtype = r == 2 ? ffi::DataType::S32 : stack.dtype;
    if (auto error = ReadResult(op, rets, r, dtype, shapes[r], results[r]); error.failure()) return error;
  }
  if (stack.dtype == ffi::DataType::F32)
    RunQr<float>(pool, threads, stack, matrices, results);
  else
    RunQr<double>(pool, threads, stack, matrices, results);
  return ffi::Error::Success();
}

}  // namespace

// `threads`: 0 lets the handler decide; a positive number counts as it is.
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    CholeskyHandler, CholeskyOf,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets().Attr<int64_t>("threads"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(TriangularSolveHandler, TriangularSolveOf,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int64_t>("transpose")
                                  .Attr<int64_t>("threads"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    EighHandler, EighOf,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets().Attr<int64_t>("threads"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    QrHandler, QrOf, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets().Attr<int64_t>("threads"));

}  // namespace curvax
