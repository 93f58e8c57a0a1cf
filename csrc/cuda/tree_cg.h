#pragma once

#include "xla/ffi/api/ffi.h"

namespace curvax {

XLA_FFI_DECLARE_HANDLER_SYMBOL(CgUpdateCudaHandler);
XLA_FFI_DECLARE_HANDLER_SYMBOL(CgDirectionCudaHandler);
XLA_FFI_DECLARE_HANDLER_SYMBOL(DotsCudaHandler);

}  // namespace curvax
