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
from typing import Any

import jax

_CPU_MODULE = "curvax._native_cpu"

# What the handlers take and give, as csrc/module_cpu.cc counts its changes.
_OPERANDS = 2
_lock = threading.Lock()
_status: Status | None = None


@dataclass(frozen=True)
class Status:
    """Whether the native CPU handlers can be used.

    Attributes:
      available: True if they can.
      reason: one sentence: what is there, or why nothing is and how to mend it.
      build: facts of the compiled module (`ffi_api`, `jaxlib`, `compiler`, `simd_levels`, `simd`); empty without one.
    """

    available: bool
    reason: str
    build: Mapping[str, Any] = field(default_factory=dict)


def native_status() -> Status:
    """Looks for the compiled module, checks its version and, if it fits, registers its handlers (once per process).

    Returns:
      The status. An absent module (a pure Python install) or one for another jaxlib is a status, not an error.

    Raises:
      ImportError: the module is there but cannot be imported, which is a broken install and not an absent one.
    """
    global _status
    with _lock:
        if _status is None:
            _status = _inspect()
        return _status


def require_native() -> None:
    """Makes sure that the handlers are registered.

    Raises:
      RuntimeError: they cannot be used; the message is the status's reason.
      ImportError: as `native_status`.
    """
    status = native_status()
    if not status.available:
        raise RuntimeError(status.reason)


def _inspect() -> Status:
    module = _load(_CPU_MODULE)
    if module is None:
        reason = f"{_CPU_MODULE} is not installed (a pure Python install): reinstall curvax with CURVAX_NATIVE=ON"
        return Status(False, reason)
    build = dict(module.build_facts())
    refusal = _stale(build) or _version_refusal(build)
    if refusal is not None:
        return Status(False, refusal, build)
    for name, capsule in module.handlers().items():
        jax.ffi.register_ffi_target(name, capsule, platform="cpu")
    api = ".".join(map(str, build["ffi_api"]))
    reason = f"built on jaxlib {build['jaxlib']} (XLA FFI {api}) with {build['compiler']}, running {build['simd']}"
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


def _stale(build: Mapping[str, Any]) -> str | None:
    """Why a module built from other sources than these cannot serve them; None if it can."""
    if build.get("operands") == _OPERANDS:
        return None
    return "the native module was built from an older curvax and takes other operands: rebuild it (pip install again)"


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
