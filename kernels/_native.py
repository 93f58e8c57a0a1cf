"""Whether the native handlers (C++ on the CPU, CUDA C++ on NVIDIA GPUs) can run a request."""

from __future__ import annotations

from curvax import ffi
from curvax.kernels._dispatch import Request

# The oldest GPU for which the CUDA module holds machine code.
_CAPABILITY = (8, 0)


def cannot(request: Request) -> str | None:
    """Why no native handler can run a request, whatever its dtypes; None if the platform's handlers are there."""
    platform = _platform(request)
    if platform is None:
        return f"the native handlers run on cpu and NVIDIA GPUs, and this is {request.platform}"
    if request.devices != 1:
        return f"outside jax.shard_map the native handlers are not partitioned, and there are {request.devices} devices"
    if platform == "cuda" and (request.capability is None or request.capability < _CAPABILITY):
        actual = "unknown" if request.capability is None else ".".join(map(str, request.capability))
        return f"the CUDA handlers need compute capability 8.0 or newer, and this GPU's is {actual}"
    status = ffi.native_status(platform)
    return None if status.available else status.reason


def _platform(request: Request) -> ffi.Platform | None:
    if request.platform in ("gpu", "cuda"):
        return "cuda"
    return "cpu" if request.platform == "cpu" else None
