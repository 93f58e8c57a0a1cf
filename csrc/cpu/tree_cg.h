#pragma once

#include "xla/ffi/api/ffi.h"

namespace curvax {

XLA_FFI_DECLARE_HANDLER_SYMBOL(CgUpdateHandler);
XLA_FFI_DECLARE_HANDLER_SYMBOL(CgDirectionHandler);
XLA_FFI_DECLARE_HANDLER_SYMBOL(DotsHandler);

}  // namespace curvax
