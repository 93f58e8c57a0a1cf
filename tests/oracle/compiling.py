"""Compilation for tests: on models this small it takes nearly all of the time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# No passes of LLVM, loops emitted directly in place of through MLIR, one module in place of some that are linked.
SWITCHES: dict[str, Any] = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}


@functools.cache
def quick_options() -> dict[str, Any]:
    """Those of `SWITCHES` that this version of XLA has."""
    if jax.default_backend() != "cpu":
        return {}
    program = jax.jit(jnp.negative).lower(1.0)

    def known(switch: str) -> bool:
        try:
            program.compile(compiler_options={switch: SWITCHES[switch]})
        except jax.errors.JaxRuntimeError as error:
            if "No such compile option" in str(error):
                return False
            raise
        return True

    return {switch: value for switch, value in SWITCHES.items() if known(switch)}


def quick_jit(function: Callable[..., Any], **options: Any) -> Any:
    """`jax.jit` without most of the CPU compiler's work: a sixth of the compile time, the same arithmetic."""
    return jax.jit(function, compiler_options=quick_options(), **options)


def array(values: Any, dtype: Any) -> jax.Array:
    """`jnp.asarray` of NumPy values, but converted by NumPy: JAX compiles a program for every shape."""
    return jnp.array(np.asarray(values).astype(dtype))
