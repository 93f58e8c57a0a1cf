"""Lazy, version-checked registration of the native XLA FFI handlers.

A handler built on newer XLA headers than the running jaxlib is refused, and if it is registered before the backend is
up, the refusal makes *every* JAX operation of the process fail. So nothing is registered, or even imported, until an op
first needs it, and the versions are compared before.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeAlias

import jax

Platform: TypeAlias = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class _Module:
    """A compiled module.

    Attributes:
      name: to import.
      platform: as `jax.ffi.register_ffi_target` calls it.
      absent: why it may be missing, and how to get it.
    """

    name: str
    platform: str
    absent: str


_MODULES: Mapping[Platform, _Module] = {
    "cpu": _Module(
        "curvax._native_cpu",
        "cpu",
        "is not installed (a pure Python install): reinstall curvax with `-C cmake.define.CURVAX_NATIVE=ON`",
    ),
    "cuda": _Module(
        "curvax._native_cuda",
        "CUDA",
        "is not installed: where nvcc is, install curvax with `pip install . -C cmake.define.CURVAX_CUDA=ON`",
    ),
}

# What the handlers take and give, as csrc/module_cpu.cc and csrc/module_cuda.cc count its changes.
_OPERANDS: Mapping[Platform, int] = {"cpu": 5, "cuda": 2}
# Handlers on stacks of matrices: XLA may give each device its part of the leading axes.
_OF_STACKS = ("curvax_cholesky", "curvax_triangular_solve", "curvax_eigh", "curvax_qr")
_lock = threading.Lock()
_statuses: dict[Platform, Status] = {}


@dataclass(frozen=True)
class Status:
    """Whether the native handlers of a platform can be used.

    Attributes:
      available: True if they can.
      reason: one sentence: what is there, or why nothing is and how to mend it.
      build: facts of the compiled module, empty without one: `ffi_api`, `jaxlib`, `operands` and `compiler`; on the CPU
        also `simd_levels` and `simd`; for CUDA also `runtime` (its version), `architectures` and `block` (elements per
        term of a sum).
    """

    available: bool
    reason: str
    build: Mapping[str, Any] = field(default_factory=dict)


def native_status(platform: Platform = "cpu") -> Status:
    """Looks for the compiled module, checks its versions and, if they fit, registers its handlers (once per process).

    Args:
      platform: "cpu", or "cuda" for NVIDIA GPUs. Handlers may be registered for a platform without a device, to compile
        for it.

    Returns:
      The status. An absent module (a pure Python install) or one for another jaxlib is a status, not an error.

    Raises:
      ImportError: the module is there but cannot be imported, which is a broken install and not an absent one.
      RuntimeError: the environment variable CURVAX_SIMD names no instruction set.
    """
    with _lock:
        if platform not in _statuses:
            _statuses[platform] = _inspect(platform)
        return _statuses[platform]


def require_native(platform: Platform = "cpu") -> None:
    """Makes sure that the handlers are registered.

    Raises:
      RuntimeError: they cannot be used; the message is the status's reason.
      ImportError: as `native_status`.
    """
    status = native_status(platform)
    if not status.available:
        raise RuntimeError(status.reason)


def _inspect(platform: Platform) -> Status:
    described = _MODULES[platform]
    module = _load(described.name)
    if module is None:
        return Status(False, f"{described.name} {described.absent}")
    build = dict(module.build_facts())
    refusal = _stale(build, _OPERANDS[platform]) or _version_refusal(build) or _driver_refusal(build, module)
    if refusal is not None:
        return Status(False, refusal, build)
    for name, capsule in module.handlers().items():
        jax.ffi.register_ffi_target(name, capsule, platform=described.platform)
        if name in _OF_STACKS:
            jax.ffi.register_ffi_target_as_batch_partitionable(name)
    api = ".".join(map(str, build["ffi_api"]))
    target = f"running {build['simd']}" if "simd" in build else f"for {build['architectures']}"
    reason = f"built on jaxlib {build['jaxlib']} (XLA FFI {api}) with {build['compiler']}, {target}"
    return Status(True, reason, build)


def _load(name: str) -> ModuleType | None:
    """The module, or None if it is not there at all."""
    if importlib.util.find_spec(name) is None:
        return None
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{name} is installed but cannot be imported ({error}): reinstall curvax", name=name
        ) from error


def _stale(build: Mapping[str, Any], operands: int) -> str | None:
    """Why a module built from other sources than these cannot serve them; None if it can."""
    if build.get("operands") == operands:
        return None
    return "the native module was built from an older curvax and takes other operands: rebuild it (pip install again)"


def _driver_refusal(build: Mapping[str, Any], module: ModuleType) -> str | None:
    """Why the CUDA driver would refuse to run a module of these build facts; None if it runs it.

    A driver runs every CUDA of its own major version and older. Without a driver nothing can run anyway, but functions
    can be compiled.
    """
    if "runtime" not in build:
        return None
    built, driver = tuple(build["runtime"]), module.driver_version()
    if driver is None or driver[0] >= built[0]:
        return None
    return (
        f"the native module was built with CUDA {built[0]}.{built[1]}, and the driver serves {driver[0]}.{driver[1]}: "
        f"update the driver or build curvax with nvcc {driver[0]}"
    )


def _version_refusal(build: Mapping[str, Any]) -> str | None:
    """Why the running jaxlib would refuse a module of these build facts; None if it takes it.

    An XLA FFI runtime takes handlers built on its own API version or an older minor one.
    """
    built = tuple(build["ffi_api"])
    running = _running_ffi_api()
    if running is None:
        # A jaxlib without headers: its release number orders it against the one the module was built on.
        if _release(version("jaxlib")) >= _release(build["jaxlib"]):
            return None
        return (
            f"the native module was built on jaxlib {build['jaxlib']}, newer than the running {version('jaxlib')}: "
            "upgrade jaxlib or rebuild curvax"
        )
    if built[0] == running[0] and built[1] <= running[1]:
        return None
    return (
        f"the native module was built on XLA FFI {built[0]}.{built[1]} (jaxlib {build['jaxlib']}), and the running "
        f"jaxlib {version('jaxlib')} has {running[0]}.{running[1]}: upgrade jaxlib or rebuild curvax"
    )


def _running_ffi_api() -> tuple[int, int] | None:
    """The XLA FFI API version of the running jaxlib, from the header it ships; None without that header."""
    header = Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    try:
        text = header.read_text(encoding="utf-8")
    except OSError:
        return None
    major = re.search(r"^#define XLA_FFI_API_MAJOR (\d+)", text, re.MULTILINE)
    minor = re.search(r"^#define XLA_FFI_API_MINOR (\d+)", text, re.MULTILINE)
    return (int(major[1]), int(minor[1])) if major and minor else None


def _release(number: str) -> tuple[int, ...]:
    """The leading numbers of a version number: "0.10.2.dev1" -> (0, 10, 2)."""
    match = re.match(r"\d+(\.\d+)*", number)
    return tuple(int(part) for part in match[0].split(".")) if match else ()
