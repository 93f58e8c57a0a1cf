// The Python module curvax._native_cpu: the CPU handlers as capsules, and the facts of this build. It registers
// nothing: python/curvax/ffi.py does, on first use and after a version check.

#include <nanobind/nanobind.h>

#include "cpu/batched_handlers.h"
#include "cpu/diagonal.h"
#include "cpu/gram.h"
#include "cpu/linalg/handlers.h"
#include "cpu/simd/instruction_set.h"
#include "cpu/tree_cg.h"
#include "xla/ffi/api/c_api.h"

namespace nb = nanobind;

namespace {

// Counts changes of what the handlers take and give: python/curvax/ffi.py refuses a build of another number.
constexpr int kOperands = 5;

nb::capsule Encapsulate(XLA_FFI_Handler* handler) { return nb::capsule(reinterpret_cast<void*>(handler)); }

nb::dict Handlers() {
  nb::dict handlers;
  handlers["curvax_cg_update"] = Encapsulate(curvax::CgUpdateHandler);
  handlers["curvax_cg_direction"] = Encapsulate(curvax::CgDirectionHandler);
  handlers["curvax_dots"] = Encapsulate(curvax::DotsHandler);
  handlers["curvax_batched_cg"] = Encapsulate(curvax::BatchedCgHandler);
  handlers["curvax_batched_cholesky_solve"] = Encapsulate(curvax::BatchedCholeskySolveHandler);
  handlers["curvax_gram_accumulate"] = Encapsulate(curvax::GramAccumulateHandler);
  handlers["curvax_diagonal_update"] = Encapsulate(curvax::DiagonalUpdateHandler);
  handlers["curvax_diagonal_accumulate"] = Encapsulate(curvax::DiagonalAccumulateHandler);
  handlers["curvax_cholesky"] = Encapsulate(curvax::CholeskyHandler);
  handlers["curvax_triangular_solve"] = Encapsulate(curvax::TriangularSolveHandler);
  handlers["curvax_eigh"] = Encapsulate(curvax::EighHandler);
  handlers["curvax_qr"] = Encapsulate(curvax::QrHandler);
  return handlers;
}

nb::dict BuildFacts() {
  nb::dict facts;
  facts["ffi_api"] = nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
  facts["jaxlib"] = CURVAX_JAXLIB_VERSION;
  facts["operands"] = kOperands;
#if defined(__clang__)
  facts["compiler"] = "clang " __clang_version__;
#else
  facts["compiler"] = "gcc " __VERSION__;
#endif
#if defined(__x86_64__)
  facts["simd_levels"] = nb::make_tuple("baseline", "avx2", "avx512f");
#else
  facts["simd_levels"] = nb::make_tuple("baseline");
#endif
  const std::string_view level = curvax::SimdLevel();
  facts["simd"] = nb::str(level.data(), level.size());
  return facts;
}

}  // namespace

NB_MODULE(_native_cpu, m) {
  m.doc() = "XLA FFI handlers of curvax for the CPU.";
  m.def("handlers", &Handlers, "Handler name -> capsule.");
  m.def("build_facts", &BuildFacts, "ffi_api, jaxlib, compiler, simd_levels and simd of this build.");
}
