// XLA FFI handlers of the dense factorizations; see kernels/dense_linalg/native.py for their contract.
#pragma once

#include "xla/ffi/api/ffi.h"

namespace curvax {

XLA_FFI_DECLARE_HANDLER_SYMBOL(CholeskyHandler);
XLA_FFI_DECLARE_HANDLER_SYMBOL(TriangularSolveHandler);
XLA_FFI_DECLARE_HANDLER_SYMBOL(EighHandler);
XLA_FFI_DECLARE_HANDLER_SYMBOL(QrHandler);

}  // namespace curvax
