// The Python module curvax._native_cuda: the CUDA handlers as capsules, and the facts of this build. It registers
// nothing: python/curvax/ffi.py does, on first use and after a version check. It can be imported without a GPU and
// without a driver: the CUDA runtime is linked statically and looks for the driver when it is first called.

#include <cuda_runtime_api.h>
#include <nanobind/nanobind.h>

#include "common/leaves.h"
#include "cuda/batched.h"
#include "cuda/diagonal.h"
#include "cuda/tree_cg.h"
#include "xla/ffi/api/c_api.h"

namespace nb = nanobind;

namespace {

// Counts changes of what the handlers take and give: python/curvax/ffi.py refuses a build of another number.
constexpr int kOperands = 2;

nb::capsule Encapsulate(XLA_FFI_Handler* handler) { return nb::capsule(reinterpret_cast<void*>(handler)); }

nb::dict Handlers() {
  nb::dict handlers;
  handlers["curvax_cg_update"] = Encapsulate(curvax::CgUpdateCudaHandler);
  handlers["curvax_cg_direction"] = Encapsulate(curvax::CgDirectionCudaHandler);
  handlers["curvax_dots"] = Encapsulate(curvax::DotsCudaHandler);
  handlers["curvax_diagonal_update"] = Encapsulate(curvax::DiagonalUpdateCudaHandler);
  handlers["curvax_diagonal_accumulate"] = Encapsulate(curvax::DiagonalAccumulateCudaHandler);
  handlers["curvax_batched_cg"] = Encapsulate(curvax::BatchedCgCudaHandler);
  handlers["curvax_batched_cholesky_solve"] = Encapsulate(curvax::BatchedCholeskySolveCudaHandler);
  return handlers;
}

// (major, minor) of the newest CUDA that the driver serves; None without a driver.
nb::object DriverVersion() {
  int version = 0;
  if (cudaDriverGetVersion(&version) != cudaSuccess || version == 0) return nb::none();
  return nb::make_tuple(version / 1000, version % 1000 / 10);
}

// Whether XLA may record calls of a handler into a CUDA graph ("command buffer"), asked as XLA asks it.
bool GraphSafe(nb::capsule handler) {
  XLA_FFI_Metadata metadata = {};
  metadata.struct_size = XLA_FFI_Metadata_STRUCT_SIZE;
  XLA_FFI_Metadata_Extension extension = {};
  extension.extension_base = {XLA_FFI_Metadata_Extension_STRUCT_SIZE, XLA_FFI_Extension_Metadata, nullptr};
  extension.metadata = &metadata;
  XLA_FFI_CallFrame frame = {};
  frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
  frame.extension_start = &extension.extension_base;
  if (reinterpret_cast<XLA_FFI_Handler*>(handler.data())(&frame) != nullptr) return false;
  return metadata.traits & XLA_FFI_HANDLER_TRAITS_COMMAND_BUFFER_COMPATIBLE;
}

nb::dict BuildFacts() {
  nb::dict facts;
  facts["ffi_api"] = nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
  facts["jaxlib"] = CURVAX_JAXLIB_VERSION;
  facts["operands"] = kOperands;
  facts["compiler"] = "nvcc " CURVAX_CUDA_VERSION;
  facts["runtime"] = nb::make_tuple(CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
  facts["architectures"] = CURVAX_CUDA_TARGETS;
  facts["block"] = curvax::kBlock;
  return facts;
}

}  // namespace

NB_MODULE(_native_cuda, m) {
  m.doc() = "XLA FFI handlers of curvax for NVIDIA GPUs.";
  m.def("handlers", &Handlers, "Handler name -> capsule.");
  m.def("graph_safe", &GraphSafe, "Whether XLA may record calls of this handler into a CUDA graph.");
  m.def("driver_version", &DriverVersion,
        "(major, minor) of the newest CUDA that the driver serves; None without one.");
  m.def("build_facts", &BuildFacts,
        "ffi_api, jaxlib, operands, compiler, runtime, architectures and block of this build.");
}
