"""The same preset of curvax and of python-somax, as steps that the harness can time."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import jax

import curvax
from bench.workloads import PyTree, Workload

Step = Callable[[Any], Any]
SOMAX = "python-somax"
CURVAX = "curvax"


def has_somax() -> bool:
    """Whether python-somax is installed (the `bench` extra)."""
    return importlib.util.find_spec("somax") is not None


def make(library: str, preset: str, **options: Any) -> Any:
    """A preset of either library."""
    if library == CURVAX:
        return curvax.make(preset, **options)
    import somax

    return somax.make(preset, **options)


def model_options(preset: str, work: Workload) -> dict[str, Any]:
    """`predict_fn` or `loss_fn`, whichever the preset takes; the names agree in both libraries."""
    if preset in ("sophia_h", "adahessian", "newton_cg", "newton_direct"):
        return {"loss_fn": work.cross_entropy}
    return {"predict_fn": work.predict}


def jitted(method: Any) -> Any:
    """The step of a method of either library, parameters and state donated."""
    return jax.jit(method.step, donate_argnums=(0, 2))


def key_for(method: Any) -> jax.Array:
    """A random key as the library takes it: typed for curvax, raw for python-somax."""
    return jax.random.key(0) if isinstance(method, curvax.Method) else jax.random.PRNGKey(0)


def stepper(method: Any, work: Workload, batch: dict[str, jax.Array]) -> tuple[Step, Callable[[], Any]]:
    """Step and first carry (params, state, info) of a method of either library."""
    step = jitted(method)
    key = key_for(method)

    def carry() -> tuple[PyTree, Any, Any]:
        params = work.params()
        return params, jax.jit(method.init)(params), {}

    return lambda c: step(c[0], batch, c[1], key), carry


def compiled_stepper(method: Any, work: Workload, batch: dict[str, jax.Array]) -> tuple[Step, Callable[[], Any], int]:
    """As `stepper`, compiled once ahead of time; and the bytes that the step allocates beyond arguments and results."""
    key, params = key_for(method), work.params()
    # Kronecker factors have the shapes of layers, which a batch tells.
    known = {"batch": batch} if isinstance(method, curvax.Method) else {}
    start = jax.jit(lambda p: method.init(p, **known))
    step = jitted(method).lower(params, batch, start(params), key).compile()

    def carry() -> tuple[PyTree, Any, Any]:
        fresh = work.params()
        return fresh, start(fresh), {}

    return lambda c: step(c[0], batch, c[1], key), carry, temp_bytes(step)


def temporary_bytes(method: Any, work: Workload, batch: dict[str, jax.Array]) -> int:
    """Bytes that the compiled step allocates beyond its arguments and results."""
    params = work.params()
    return compiled_temporary_bytes(jitted(method), params, batch, method.init(params), key_for(method))


def compiled_temporary_bytes(function: Any, *arguments: Any) -> int:
    """Bytes that a jitted function allocates beyond its arguments and results, as the compiler counts them."""
    return temp_bytes(function.lower(*arguments).compile())


def temp_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes that a compiled function allocates beyond its arguments and results, as the compiler counts them."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise RuntimeError("this backend has no memory analysis: run the plan suite on CPU or GPU.")
    return int(analysis.temp_size_in_bytes)
