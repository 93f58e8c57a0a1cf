// Operands and results of a foreign call, read and checked: what every handler does before it touches memory. An error
// names the op, the operand, its shape and its dtype.
#pragma once

#include <algorithm>
#include <cstdint>
#include <sstream>
#include <string>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace curvax {

namespace ffi = xla::ffi;

using Dims = std::vector<int64_t>;

template <typename Span>
Dims ToDims(const Span& span) {
  return Dims(span.begin(), span.end());
}

inline std::string Shape(const Dims& dims) {
  std::ostringstream out;
  out << '(';
  for (size_t i = 0; i < dims.size(); ++i) out << (i ? ", " : "") << dims[i];
  out << ')';
  return out.str();
}

inline std::string Name(ffi::DataType dtype) {
  std::ostringstream out;
  out << dtype;
  return out.str();
}

inline int64_t Product(const Dims& dims) {
  int64_t product = 1;
  for (int64_t d : dims) product *= d;
  return product;
}

template <typename... Parts>
inline ffi::Error Refuse(const char* op, const Parts&... parts) {
  std::ostringstream out;
  out << "curvax " << op << ": ";
  (out << ... << parts);
  return ffi::Error::InvalidArgument(out.str());
}

struct Operand {
  ffi::DataType dtype;
  Dims dims;
  void* data;
};

inline ffi::Error Argument(const char* op, ffi::RemainingArgs args, size_t index, Operand& operand) {
  auto buffer = args.get<ffi::AnyBuffer>(index);
  if (buffer.has_error()) return Refuse(op, "operand ", index, " is not a buffer");
  operand = {buffer->element_type(), ToDims(buffer->dimensions()), buffer->untyped_data()};
  return ffi::Error::Success();
}

inline ffi::Error Result(const char* op, ffi::RemainingRets rets, size_t index, Operand& operand) {
  auto buffer = rets.get<ffi::AnyBuffer>(index);
  if (buffer.has_error()) return Refuse(op, "result ", index, " is not a buffer");
  operand = {(*buffer)->element_type(), ToDims((*buffer)->dimensions()), (*buffer)->untyped_data()};
  return ffi::Error::Success();
}

inline ffi::Error CheckDtype(const char* op, ffi::DataType dtype) {
  if (dtype == ffi::DataType::F32 || dtype == ffi::DataType::F64) return ffi::Error::Success();
  return Refuse(op, "dtype ", Name(dtype), " is not supported; use F32 or F64");
}

inline ffi::Error CheckSame(const char* op, const char* what, size_t index, const Operand& operand, ffi::DataType dtype,
                            const Dims& dims) {
  if (operand.dtype != dtype)
    return Refuse(op, what, " ", index, " has dtype ", Name(operand.dtype), ", expected ", Name(dtype));
  if (operand.dims != dims)
    return Refuse(op, what, " ", index, " has shape ", Shape(operand.dims), ", expected ", Shape(dims));
  return ffi::Error::Success();
}

template <typename T>
T* Data(const Operand& operand) {
  return static_cast<T*>(operand.data);
}

}  // namespace curvax
