#pragma once

#include "xla/ffi/api/ffi.h"

namespace curvax {

XLA_FFI_DECLARE_HANDLER_SYMBOL(DiagonalUpdateHandler);
XLA_FFI_DECLARE_HANDLER_SYMBOL(DiagonalAccumulateHandler);

}  // namespace curvax
