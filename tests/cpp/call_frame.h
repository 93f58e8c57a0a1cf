// Calls an XLA FFI handler as XLA does, without XLA: a call frame built by hand, and just enough of XLA's API behind it
// (errors, a thread pool, a stream).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

// What the opaque types of the C API are here.
struct XLA_FFI_Error {
  std::string message;
};
struct XLA_FFI_ExecutionContext {
  int64_t threads = 1;
  std::vector<std::thread> tasks;
};

namespace call_frame {

namespace ffi = xla::ffi;

// A buffer of exactly its size, `shift` bytes past a 16-byte boundary, so that the address sanitizer sees every access
// outside it.
struct Buffer {
  ffi::DataType dtype;
  std::vector<int64_t> dims;
  std::shared_ptr<char> memory;
  char* data = nullptr;

  Buffer(ffi::DataType dtype_, std::vector<int64_t> dims_, size_t shift = 0) : dtype(dtype_), dims(std::move(dims_)) {
    const size_t bytes = size() * ffi::ByteWidth(dtype);
    memory.reset(new char[bytes + shift], std::default_delete<char[]>());
    data = memory.get() + shift;
    std::memset(data, 0x7f, bytes);
  }

  int64_t size() const {
    int64_t product = 1;
    for (int64_t d : dims) product *= d;
    return product;
  }

  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data);
  }

  // Another buffer of this one's shape with a copy of its elements.
  Buffer Copy() const {
    Buffer copy(dtype, dims, (data - memory.get()));
    std::copy_n(data, size() * ffi::ByteWidth(dtype), copy.data);
    return copy;
  }
};

inline XLA_FFI_Error* CreateError(XLA_FFI_Error_Create_Args* args) { return new XLA_FFI_Error{args->message}; }
inline void GetMessage(XLA_FFI_Error_GetMessage_Args* args) { args->message = args->error->message.c_str(); }
inline void DestroyError(XLA_FFI_Error_Destroy_Args* args) { delete args->error; }
// Every task gets a thread of its own, which outlives the call, as a late task of XLA's pool may.
inline XLA_FFI_Error* Schedule(XLA_FFI_ThreadPool_Schedule_Args* args) {
  args->ctx->tasks.emplace_back(args->task, args->data);
  return nullptr;
}
inline XLA_FFI_Error* NumThreads(XLA_FFI_ThreadPool_NumThreads_Args* args) {
  *args->num_threads = args->ctx->threads;
  return nullptr;
}
inline XLA_FFI_Error* GetStream(XLA_FFI_Stream_Get_Args* args) {
  args->stream = nullptr;
  return nullptr;
}

inline const XLA_FFI_Api* Api() {
  static const XLA_FFI_Api api = [] {
    XLA_FFI_Api table = {};
    table.struct_size = XLA_FFI_Api_STRUCT_SIZE;
    table.XLA_FFI_Error_Create = CreateError;
    table.XLA_FFI_Error_GetMessage = GetMessage;
    table.XLA_FFI_Error_Destroy = DestroyError;
    table.XLA_FFI_ThreadPool_Schedule = Schedule;
    table.XLA_FFI_ThreadPool_NumThreads = NumThreads;
    table.XLA_FFI_Stream_Get = GetStream;
    return table;
  }();
  return &api;
}

// An attribute of a call: integers (one, or an array of them) or a boolean.
struct Attribute {
  std::string name;
  std::vector<int64_t> values;
  enum { kInteger, kIntegers, kBoolean } kind = kInteger;
};

// Calls `handler`; the message of the error that it returns, or nothing. `pool` is how many threads the pool says it
// has.
inline std::optional<std::string> Call(XLA_FFI_Handler* handler, const std::vector<Buffer>& operands,
                                       const std::vector<Buffer>& results, std::vector<Attribute> attributes,
                                       int64_t pool = 1) {
  std::deque<XLA_FFI_Buffer> buffers;
  std::vector<void*> args, rets;
  const auto add = [&](const Buffer& buffer, std::vector<void*>& list) {
    buffers.push_back({XLA_FFI_Buffer_STRUCT_SIZE, nullptr, static_cast<XLA_FFI_DataType>(buffer.dtype), buffer.data,
                       static_cast<int64_t>(buffer.dims.size()), const_cast<int64_t*>(buffer.dims.data())});
    list.push_back(&buffers.back());
  };
  for (const Buffer& operand : operands) add(operand, args);
  for (const Buffer& result : results) add(result, rets);
  std::vector<XLA_FFI_ArgType> arg_types(args.size(), XLA_FFI_ArgType_BUFFER);
  std::vector<XLA_FFI_RetType> ret_types(rets.size(), XLA_FFI_RetType_BUFFER);

  // By name, as XLA has them.
  std::sort(attributes.begin(), attributes.end(), [](const auto& a, const auto& b) { return a.name < b.name; });
  std::deque<XLA_FFI_Scalar> scalars;
  std::deque<XLA_FFI_Array> arrays;
  std::deque<XLA_FFI_ByteSpan> spans;
  std::deque<bool> booleans;
  std::vector<XLA_FFI_AttrType> attr_types;
  std::vector<XLA_FFI_ByteSpan*> names;
  std::vector<void*> attrs;
  for (Attribute& attribute : attributes) {
    spans.push_back({attribute.name.data(), attribute.name.size()});
    names.push_back(&spans.back());
    attr_types.push_back(attribute.kind == Attribute::kIntegers ? XLA_FFI_AttrType_ARRAY : XLA_FFI_AttrType_SCALAR);
    if (attribute.kind == Attribute::kIntegers) {
      arrays.push_back({XLA_FFI_DataType_S64, attribute.values.size(), attribute.values.data()});
      attrs.push_back(&arrays.back());
      continue;
    }
    const bool boolean = attribute.kind == Attribute::kBoolean;
    booleans.push_back(attribute.values[0] != 0);
    scalars.push_back({boolean ? XLA_FFI_DataType_PRED : XLA_FFI_DataType_S64,
                       boolean ? static_cast<void*>(&booleans.back()) : attribute.values.data()});
    attrs.push_back(&scalars.back());
  }

  XLA_FFI_ExecutionContext context;
  context.threads = pool;
  XLA_FFI_CallFrame frame = {};
  frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
  frame.api = Api();
  frame.ctx = &context;
  frame.stage = XLA_FFI_ExecutionStage_EXECUTE;
  frame.args = {XLA_FFI_Args_STRUCT_SIZE, nullptr, static_cast<int64_t>(args.size()), arg_types.data(), args.data()};
  frame.rets = {XLA_FFI_Rets_STRUCT_SIZE, nullptr, static_cast<int64_t>(rets.size()), ret_types.data(), rets.data()};
  frame.attrs = {XLA_FFI_Attrs_STRUCT_SIZE, nullptr,      static_cast<int64_t>(attrs.size()),
                 attr_types.data(),         names.data(), attrs.data()};
  const std::unique_ptr<XLA_FFI_Error> error(handler(&frame));
  for (std::thread& task : context.tasks) task.join();
  return error ? std::optional(error->message) : std::nullopt;
}

// The same with no attribute but `threads`, or none if that is nothing.
inline std::optional<std::string> Call(XLA_FFI_Handler* handler, const std::vector<Buffer>& operands,
                                       const std::vector<Buffer>& results, std::optional<int64_t> threads,
                                       int64_t pool = 1) {
  std::vector<Attribute> attributes;
  if (threads) attributes.push_back({"threads", {*threads}});
  return Call(handler, operands, results, attributes, pool);
}

}  // namespace call_frame
