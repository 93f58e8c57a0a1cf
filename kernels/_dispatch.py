"""The one dispatcher: which implementation of an op runs, why, and a record of what ran.

An op (`Op`) declares its implementations (`Variant`), best first, the plain JAX reference last. A variant's probe looks
at a `Request` (platform, dtypes, sizes, devices) and answers with the reason why it cannot run, or None.

Two questions are answered here and nowhere else:

- `select(op, implementation, request)`, asked by an op when it is called: None takes the best supported variant, a name
  takes that one or raises `Unsupported`.
- `resolve(op, backend, request)`, asked by the planner: a backend is a preference, and an op that cannot honour it
  falls back to its reference, with the reason, one warning, and an error under `strict_backend`.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import threading
import warnings
from collections.abc import Callable, Generator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import jax
import numpy as np

Implementation: TypeAlias = Literal["reference", "pallas", "triton", "native"]
Backend: TypeAlias = Literal["auto", "reference", "pallas", "triton", "native"]


class Unsupported(Exception):
    """An implementation that was asked for cannot run here.

    Attributes:
      reason: one sentence that names the op, the implementation and what stands in the way.
    """

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Request:
    """What a probe may look at; everything is known while tracing.

    Attributes:
      platform: "cpu", "gpu" or "tpu", where the computation is expected to run.
      devices: how many devices of one program see the whole array: 1 inside `jax.shard_map` with all axes manual, where
        each device calls the op on its own shard.
      dtypes: the distinct dtypes of the operands.
      shapes: of each leaf of the first operand.
      capability: CUDA compute capability, (9, 0) for an H100; None where there is no NVIDIA GPU, or an unknown one.
    """

    platform: str
    devices: int
    dtypes: tuple[np.dtype, ...]
    shapes: tuple[tuple[int, ...], ...]
    capability: tuple[int, int] | None = None

    @staticmethod
    def of(*trees: Any) -> Request:
        """The request of an op on these operands (arrays or `jax.ShapeDtypeStruct`s); shapes are the first's."""
        platform = _platform()
        leaves = jax.tree.leaves(trees)
        return Request(
            platform=platform,
            devices=_devices(platform),
            dtypes=tuple(sorted({np.dtype(leaf.dtype) for leaf in leaves}, key=str)),
            shapes=tuple(tuple(leaf.shape) for leaf in jax.tree.leaves(trees[0])) if trees else (),
            capability=_capability(platform),
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of elements of each leaf."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def size(self) -> int:
        """Number of elements over all leaves."""
        return sum(self.sizes)


Probe: TypeAlias = Callable[[Request], str | None]


def timed_on_hopper(request: Request) -> str | None:
    """The `better_not` of a GPU implementation that was faster than the reference on an H200, the only GPU timed."""
    if request.platform != "gpu" or request.capability == (9, 0):
        return None
    return "it has been timed on Hopper GPUs alone: ask for it by name"


def not_faster_on_gpu(request: Request) -> str | None:
    """The `better_not` of a GPU implementation that an H200 ran no faster than the reference."""
    return "an H200 ran the reference as fast: ask for it by name" if request.platform == "gpu" else None


def _no_objection(request: Request) -> str | None:
    del request
    return None


@dataclass(frozen=True)
class Variant:
    """One implementation of an op.

    Attributes:
      name: which.
      cannot: the reason why it cannot run a request, or None.
      better_not: the reason why "auto" should not choose it for a request that it can run (slower there, say), or None.
      gain: the reason to prefer it, as the plan shows it.
    """

    name: Implementation
    cannot: Probe = _no_objection
    better_not: Probe = _no_objection
    gain: str = "always available"


@dataclass(frozen=True)
class Op:
    """An operation: a name and its variants, best first, the reference last."""

    name: str
    variants: tuple[Variant, ...]

    def __post_init__(self) -> None:
        """Checks that the reference stands last and no name twice."""
        names = [variant.name for variant in self.variants]
        if not names or names[-1] != "reference" or len(set(names)) != len(names):
            raise ValueError(f"op {self.name} must list distinct implementations with the reference last, got {names}")

    def variant(self, name: Implementation) -> Variant | None:
        """The variant of that name, or None if the op has none."""
        return next((variant for variant in self.variants if variant.name == name), None)


@dataclass(frozen=True)
class Choice:
    """Which implementation of an op, and why."""

    op: str
    implementation: Implementation
    reason: str


@dataclass(frozen=True)
class KernelRecord:
    """A choice that was traced, and how many times."""

    choice: Choice
    count: int


_strict: ContextVar[bool] = ContextVar("curvax_strict_backend", default=False)
_lock = threading.Lock()
_warned: set[tuple[str, str, str]] = set()
_records: dict[Choice, int] = {}


@contextlib.contextmanager
def strict_backend() -> Generator[None]:
    """Inside this context a fallback from a backend that was asked for raises `Unsupported` instead of warning."""
    token = _strict.set(True)
    try:
        yield
    finally:
        _strict.reset(token)


def check_backend(backend: str) -> None:
    """Raises ValueError for what is no `Backend`."""
    known = get_args(Backend)
    if backend not in known:
        raise ValueError(f"backend must be one of {', '.join(known)}, got {backend!r}")


def resolve(op: Op, backend: Backend, request: Request) -> Choice:
    """The implementation of `op` under a method's `backend`, which is a preference.

    Args:
      op: the op.
      backend: "auto" for the best supported implementation, or the name of the one to prefer.
      request: what the op will be called on.

    Returns:
      The choice, with its reason.

    Raises:
      Unsupported: under `strict_backend`, if the op lacks the backend or the backend cannot run the request.
      ValueError: `backend` is no backend.
    """
    check_backend(backend)
    if backend == "auto":
        return _best(op, request)
    objection = _objection(op, backend, request)
    if objection is None:
        return Choice(op.name, backend, f'backend="{backend}"')
    if _strict.get():
        raise Unsupported(objection)
    reason = f"fell back: {objection}"
    _warn_once(op.name, backend, reason)
    return Choice(op.name, "reference", reason)


def select(op: Op, implementation: Implementation | Choice | None, request: Request) -> Choice:
    """The implementation for one call of `op`, entered into the report.

    Args:
      op: the op.
      implementation: None for the best supported one, a name, or a choice that `resolve` made for this op and request.
      request: the operands of the call.

    Returns:
      The choice, with its reason.

    Raises:
      Unsupported: the named implementation does not exist or cannot run the request.
      ValueError: `implementation` is no implementation.
    """
    if isinstance(implementation, Choice):
        choice = implementation
    elif implementation is None:
        choice = _best(op, request)
    elif implementation not in get_args(Implementation):
        raise ValueError(
            f"implementation must be None or one of {', '.join(get_args(Implementation))}, got {implementation!r}"
        )
    else:
        objection = _objection(op, implementation, request)
        if objection is not None:
            raise Unsupported(objection)
        choice = Choice(op.name, implementation, "asked for by name")
    with _lock:
        _records[choice] = _records.get(choice, 0) + 1
    return choice


def report() -> tuple[KernelRecord, ...]:
    """What was chosen at op calls since the start or `clear_report`, in order of first use.

    Choices are made while tracing: a compiled function that runs again adds nothing.
    """
    with _lock:
        return tuple(KernelRecord(choice, count) for choice, count in _records.items())


def clear_report() -> None:
    """Empties the report and lets warnings about fallbacks be given again."""
    with _lock:
        _records.clear()
        _warned.clear()


def _best(op: Op, request: Request) -> Choice:
    """The first variant without objection; the reason names what stood in the way of those before it."""
    skipped = []
    for variant in op.variants:
        objection = variant.cannot(request) or variant.better_not(request)
        if objection is None:
            passed = f" ({'; '.join(skipped)})" if skipped else ""
            return Choice(op.name, variant.name, f"auto: {variant.gain}{passed}")
        skipped.append(f"{variant.name}: {objection}")
    raise Unsupported(f"no implementation of {op.name} can run here: {'; '.join(skipped)}")


def _objection(op: Op, implementation: Implementation, request: Request) -> str | None:
    variant = op.variant(implementation)
    if variant is None:
        have = ", ".join(v.name for v in op.variants)
        return f"{op.name} has no {implementation} implementation (it has {have})"
    why = variant.cannot(request)
    return None if why is None else f"{implementation} cannot run {op.name}: {why}"


def _warn_once(op: str, backend: str, reason: str) -> None:
    key = (op, backend, reason)
    with _lock:
        if key in _warned:
            return
        _warned.add(key)
    warnings.warn(f'backend="{backend}": {op} {reason}', UserWarning, stacklevel=caller_level())


def caller_level() -> int:
    """The `stacklevel`, for who calls this, of the nearest frame outside of curvax and JAX: who asked for a backend."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("curvax", "jax"):
        frame, level = frame.f_back, level + 1
    return level


def _platform() -> str:
    """Where the computation is expected to run.

    That is the device of the surrounding mesh, if it names one (as when compiling for a device that is not there), else
    `jax_default_device`, else the default backend.
    """
    described = _mesh_device()
    if described is not None:
        return described.platform
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform


def _mesh_device() -> Any:
    """The device that the surrounding mesh says it consists of; None without a mesh or where it does not say."""
    described = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    # Before jax 0.11 a mesh describes devices without their platform.
    return described if hasattr(described, "platform") else None


# Compute capabilities by what a device calls itself, for meshes of devices that are described and not there.
_CAPABILITIES = {
    "A100": (8, 0),
    "A10G": (8, 6),
    "L4": (8, 9),
    "L40": (8, 9),
    "H100": (9, 0),
    "H200": (9, 0),
    "GH200": (9, 0),
    "B200": (10, 0),
    "GB200": (10, 0),
}


def _capability(platform: str) -> tuple[int, int] | None:
    if platform not in ("gpu", "cuda"):
        return None
    described = _mesh_device()
    if described is not None:
        words = described.device_kind.replace("-", " ").split()
        return next((_CAPABILITIES[word] for word in words if word in _CAPABILITIES), None)
    version = getattr(jax.devices(platform)[0], "compute_capability", None)
    if not isinstance(version, str) or "." not in version:
        return None
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _devices(platform: str) -> int:
    """How many devices may share one array: those of the mesh or the platform, or 1 where every mesh axis is manual."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.are_all_axes_manual:
        return 1
    return jax.device_count(platform) if mesh.empty else mesh.size
