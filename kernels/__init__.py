"""Operations with one meaning and several implementations; see `_dispatch` for how one is chosen."""

from __future__ import annotations

from curvax.kernels._dispatch import (
    Backend,
    Choice,
    Implementation,
    KernelRecord,
    Op,
    Request,
    Unsupported,
    Variant,
    caller_level,
    clear_report,
    report,
    resolve,
    select,
    strict_backend,
)

__all__ = [
    "Backend",
    "Choice",
    "Implementation",
    "KernelRecord",
    "Op",
    "Request",
    "Unsupported",
    "Variant",
    "caller_level",
    "clear_report",
    "report",
    "resolve",
    "select",
    "strict_backend",
]
