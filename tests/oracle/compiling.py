"""Compilation for tests: on models this small it takes nearly all of the time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def quick_jit(function: Callable[..., Any], **options: Any) -> Any:
    """`jax.jit` without the CPU compiler's optimisation passes: about half the compile time, the same arithmetic."""
    if jax.default_backend() == "cpu":
        options["compiler_options"] = {"xla_backend_optimization_level": 0}
    return jax.jit(function, **options)
