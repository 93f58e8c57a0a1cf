"""Pallas' Mosaic GPU backend: whether it is here, whether it can run a request, and its interpreter.

Nothing is imported before it is asked for: the backend takes a while to load, and a machine without a GPU needs none.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from types import ModuleType
from typing import Any

import jax

from curvax.kernels._dispatch import Request

_MODULE = "jax.experimental.pallas.mosaic_gpu"

# The oldest GPU with the copy engine, the barriers and the clusters that Mosaic GPU kernels are made of.
_CAPABILITY = (9, 0)

_NAMES = (
    "Barrier",
    "ClusterBarrier",
    "InterpretGPUParams",
    "Layout",
    "OOBFillMode",
    "SMEM",
    "barrier_arrive",
    "barrier_wait",
    "broadcasted_iota",
    "commit_smem",
    "copy_gmem_to_smem",
    "copy_smem_to_gmem",
    "layout_cast",
    "load",
    "wait_smem_to_gmem",
)
_OPTIONAL = inspect.Parameter("idx", inspect.Parameter.KEYWORD_ONLY, default=None)
_KERNEL_PARAMETERS = (
    "out_type",
    "scratch_types",
    "grid",
    "grid_names",
    "cluster",
    "cluster_names",
    "compiler_params",
    "interpret",
)


def cannot(request: Request) -> str | None:
    """Why a Mosaic GPU kernel cannot run a request; None if it can."""
    if request.platform not in ("gpu", "cuda"):
        return f"Mosaic kernels run on NVIDIA GPUs, and this is {request.platform}"
    if request.capability is None or request.capability < _CAPABILITY:
        actual = "unknown" if request.capability is None else ".".join(map(str, request.capability))
        return f"Mosaic kernels need compute capability 9.0 (Hopper) or newer, and this GPU's is {actual}"
    if request.devices != 1:
        return f"outside jax.shard_map Mosaic kernels are not partitioned, and there are {request.devices} devices"
    return absent()


@functools.cache
def absent() -> str | None:
    """Why this JAX has no Mosaic GPU backend that the kernels here can use; None if it has."""
    try:
        module = importlib.import_module(_MODULE)
    except ModuleNotFoundError as error:
        # jax 0.10 imports absl there without depending on it. Anything else that is missing is a broken installation.
        if error.name is None or error.name.split(".")[0] not in ("absl", "jax"):
            raise
        return f"{_MODULE} cannot be imported without {error.name}: install jax 0.11 or newer"
    missing = [name for name in _NAMES if not hasattr(module, name)]
    missing += [f"kernel({name}=)" for name in _KERNEL_PARAMETERS if name not in _parameters(module.kernel)]
    # Once the index was a required argument, and the interpreter did not know loads.
    if (
        not missing
        and inspect.signature(module.load).parameters.get("idx", _OPTIONAL).default is inspect.Parameter.empty
    ):
        missing = ["load(view)"]
    if missing:
        return f"{_MODULE} of jax {jax.__version__} has no {', '.join(missing)}: install jax 0.11 or newer"
    return None


def _parameters(function: Any) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def backend() -> ModuleType:
    """`jax.experimental.pallas.mosaic_gpu`. Raises ImportError where `absent` says why there is none."""
    reason = absent()
    if reason is not None:
        raise ImportError(reason)
    return importlib.import_module(_MODULE)


def load(view: Any, layout: Any) -> jax.Array:
    """The whole of a view of a reference, spread over the threads as `layout` says, whatever its alignment."""
    return backend().load(view, layout=layout, optimized=False)


def interpreter() -> Any:
    """What `plgpu.kernel(interpret=...)` takes to run a kernel on the CPU with race detection: for tests alone."""
    return backend().InterpretGPUParams(detect_races=True)


def races_found() -> bool:
    """Whether the kernel that last ran under `interpreter` had a data race: for tests alone.

    The one place where curvax touches a private module: JAX detects races and exports no way to ask for them.
    """
    private = importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call")
    return bool(private.get_races().races_found)
