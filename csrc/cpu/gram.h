#pragma once

#include "xla/ffi/api/ffi.h"

namespace curvax {

XLA_FFI_DECLARE_HANDLER_SYMBOL(GramAccumulateHandler);

}  // namespace curvax
