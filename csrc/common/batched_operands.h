// Operands and results of the ops on many linear systems, read and checked: the same on CPU and GPU.
#pragma once

#include <cstdint>

#include "common/batch.h"
#include "common/operands.h"

namespace curvax {

// An operand whose batch axes broadcast.
struct Entries {
  Operand operand;
  Broadcast broadcast;
  int64_t own = 1;  // elements per system

  template <typename T>
  const T* Of(int64_t system) const {
    return static_cast<const T*>(operand.data) + broadcast.At(system) * own;
  }
};

// Matrices and right-hand sides, and the results value, result, iterations and residual.
struct SystemsCall {
  ffi::DataType dtype;
  bool narrow = false;  // matrices are bfloat16
  Dims batch;
  int64_t systems = 0;
  int64_t n = 0;
  Entries matrices, rhs;
  Operand value, result, iterations, residual;
};

inline ffi::Error ReadEntries(const char* op, ffi::RemainingArgs args, size_t index, ffi::DataType dtype,
                              const Dims& batch, const Dims& own, Entries& entries) {
  if (auto error = Argument(op, args, index, entries.operand); error.failure()) return error;
  if (entries.operand.dtype != dtype)
    return Refuse(op, "operand ", index, " has dtype ", Name(entries.operand.dtype), ", expected ", Name(dtype));
  entries.own = Product(own);
  return MakeBroadcast(op, index, entries.operand, batch, own, entries.broadcast);
}

inline ffi::Error ReadSystems(const char* op, ffi::RemainingArgs args, ffi::RemainingRets rets, size_t operands,
                              SystemsCall& call) {
  if (args.size() != operands || rets.size() < 4)
    return Refuse(op, "got ", args.size(), " operands and ", rets.size(), " results, expected ", operands, " and 4");
  if (auto error = Result(op, rets, 0, call.value); error.failure()) return error;
  if (auto error = Result(op, rets, 1, call.result); error.failure()) return error;
  if (auto error = Result(op, rets, 2, call.iterations); error.failure()) return error;
  if (auto error = Result(op, rets, 3, call.residual); error.failure()) return error;
  call.dtype = call.value.dtype;
  if (auto error = CheckDtype(op, call.dtype); error.failure()) return error;
  if (call.value.dims.empty()) return Refuse(op, "result 0 is a scalar, expected (..., n)");
  call.n = call.value.dims.back();
  call.batch = Dims(call.value.dims.begin(), call.value.dims.end() - 1);
  call.systems = Product(call.batch);
  const ffi::DataType integer = ffi::DataType::S32;
  if (auto error = CheckSame(op, "result", 1, call.result, integer, call.batch); error.failure()) return error;
  if (auto error = CheckSame(op, "result", 2, call.iterations, integer, call.batch); error.failure()) return error;
  if (auto error = CheckSame(op, "result", 3, call.residual, call.dtype, call.batch); error.failure()) return error;
  Operand matrices;
  if (auto error = Argument(op, args, 0, matrices); error.failure()) return error;
  call.narrow = matrices.dtype == ffi::DataType::BF16 && call.dtype == ffi::DataType::F32;
  const ffi::DataType of_matrices = call.narrow ? ffi::DataType::BF16 : call.dtype;
  if (auto error = ReadEntries(op, args, 0, of_matrices, call.batch, {call.n, call.n}, call.matrices); error.failure())
    return error;
  return ReadEntries(op, args, 1, call.dtype, call.batch, {call.n}, call.rhs);
}

// batched_cg: matrices, rhs, rtol, maxiter, then the start and the preconditioner's inverse where the flags say so.
struct CgCall : SystemsCall {
  bool has_start = false, has_inverse = false;
  Entries rtol, maxiter, start, inverse;
};

inline ffi::Error ReadCg(ffi::RemainingArgs args, ffi::RemainingRets rets, int64_t start, int64_t inverse,
                         CgCall& call) {
  constexpr const char* op = "batched_cg";
  call.has_start = start != 0;
  call.has_inverse = inverse != 0;
  if (auto error = ReadSystems(op, args, rets, 4 + call.has_start + call.has_inverse, call); error.failure())
    return error;
  if (auto error = ReadEntries(op, args, 2, call.dtype, call.batch, {}, call.rtol); error.failure()) return error;
  if (auto error = ReadEntries(op, args, 3, ffi::DataType::S32, call.batch, {}, call.maxiter); error.failure())
    return error;
  size_t index = 4;
  if (call.has_start)
    if (auto error = ReadEntries(op, args, index++, call.dtype, call.batch, {call.n}, call.start); error.failure())
      return error;
  if (call.has_inverse) return ReadEntries(op, args, index, call.dtype, call.batch, {call.n}, call.inverse);
  return ffi::Error::Success();
}

// batched_cholesky_solve: matrices, rhs, damping.
struct CholeskyCall : SystemsCall {
  Entries damping;
};

inline ffi::Error ReadCholesky(ffi::RemainingArgs args, ffi::RemainingRets rets, CholeskyCall& call) {
  constexpr const char* op = "batched_cholesky_solve";
  if (auto error = ReadSystems(op, args, rets, 3, call); error.failure()) return error;
  return ReadEntries(op, args, 2, call.dtype, call.batch, {}, call.damping);
}

}  // namespace curvax
