"""Quantities of the rows over a gradient: diagonal, norms and clipped sums of gradients, Kronecker factors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from bench import libraries, run
from bench.generic import generic_capture
from bench.schema import Row
from bench.suites.structure.measure import precision
from bench.workloads import CNN, MLP, SMALL, PyTree, Workload
from curvax.curvature import Evaluation, GaussNewton, GeneralizedGaussNewton, Model, MonteCarloFisher, Needs
from curvax.losses import SoftmaxCrossEntropy
from curvax.preconditioners._blocks import measured
from curvax.structure import clipped_gradient, ggn_diagonal, per_example_gradient_norms
from curvax.structure.diagonal import example_diagonal
from curvax.structure.kronecker import FactorSums, WeightSharing
from curvax.structure.memory import DEFAULT_MAX_BYTES

GRADIENT = "gradient"
REVERSE, VMAPPED = "every leaf by reverse mode", "vmapped gradients"
SLOW = frozenset({REVERSE, VMAPPED})
_Function = Callable[[PyTree, dict[str, jax.Array]], Any]


def tables(suite: str, quick: bool, only: str) -> Iterator[list[Row]]:
    """Rows of each quantity, all beside the gradient."""
    for work in (SMALL,) if quick else (MLP, CNN):
        for quantity, functions, goals in _quantities(work):
            case = f"{quantity}, {work.name}"
            if only in case:
                with precision(work):
                    yield _rows(suite, case, work, 128, {GRADIENT: _gradient(work), **functions}, goals, quick)


def _quantities(work: Workload) -> Iterator[tuple[str, dict[str, _Function], dict[str, float]]]:
    loss = SoftmaxCrossEntropy()
    # The goals are those of a network of dense layers.
    goal = {"curvax": 4.0} if work is MLP else {}
    yield "exact GGN diagonal", {"curvax": _diagonal(work, loss), REVERSE: _generic(work)}, goal
    norms = {"curvax": _norms(work, loss), VMAPPED: _vmapped_norms(work)}
    yield "per-example gradient norms", norms, {}
    clipped = {"curvax": _clipped(work, loss), VMAPPED: _vmapped_clipped(work)}
    # Two passes back; a convolution also forms its gradient of every example.
    yield "sum of clipped gradients", clipped, {"curvax": 2.0} if work is MLP else {}
    yield "Kronecker factors of K-FAC", {"curvax": _kronecker(work, loss)}, {"curvax": 1.5} if work is MLP else {}


def _gradient(work: Workload) -> _Function:
    return jax.grad(work.cross_entropy)


def _diagonal(work: Workload, loss: SoftmaxCrossEntropy) -> _Function:
    return lambda params, batch: ggn_diagonal(work.predict, loss, params, batch["x"], batch["y"])


def _generic(work: Workload) -> _Function:
    loss = SoftmaxCrossEntropy()

    def diagonal(params: PyTree, batch: dict[str, jax.Array]) -> PyTree:
        outputs = work.predict(params, batch["x"])
        weights = loss.effective_weights(outputs, None)
        bound = GeneralizedGaussNewton().bind(loss, outputs, batch["y"], weights, None)
        captured = generic_capture(work.predict, params, batch["x"])
        return example_diagonal(captured, params, batch["x"], bound, DEFAULT_MAX_BYTES)

    return diagonal


def _norms(work: Workload, loss: SoftmaxCrossEntropy) -> _Function:
    return lambda params, batch: per_example_gradient_norms(work.predict, loss, params, batch["x"], batch["y"])


def _vmapped_norms(work: Workload) -> _Function:
    """As one writes it: a gradient per example."""

    def one(params: PyTree, x: jax.Array, y: jax.Array) -> jax.Array:
        gradient = jax.grad(work.cross_entropy)(params, {"x": x[None], "y": y[None]})
        return jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(gradient)))

    return lambda params, batch: jax.vmap(one, (None, 0, 0))(params, batch["x"], batch["y"]) / batch["y"].shape[0]


_MAX_NORM = 1e-2


def _clipped(work: Workload, loss: SoftmaxCrossEntropy) -> _Function:
    def clipped(params: PyTree, batch: dict[str, jax.Array]) -> PyTree:
        return clipped_gradient(work.predict, loss, params, batch["x"], batch["y"], max_norm=_MAX_NORM).gradient

    return clipped


def _vmapped_clipped(work: Workload) -> _Function:
    """As one writes it: a gradient per example, clipped, and their sum."""

    def one(params: PyTree, x: jax.Array, y: jax.Array, share: float) -> PyTree:
        gradient = jax.tree.map(lambda g: share * g, jax.grad(work.cross_entropy)(params, {"x": x[None], "y": y[None]}))
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(gradient)))
        return jax.tree.map(lambda g: g * jnp.minimum(1, _MAX_NORM / norm), gradient)

    def total(params: PyTree, batch: dict[str, jax.Array]) -> PyTree:
        each = jax.vmap(one, (None, 0, 0, None))(params, batch["x"], batch["y"], 1 / batch["y"].shape[0])
        return jax.tree.map(lambda g: g.sum(axis=0), each)

    return total


def _kronecker(work: Workload, loss: SoftmaxCrossEntropy) -> _Function:
    """The factors of one batch, with one sampled target per example, as K-FAC refreshes them."""
    curvature = GaussNewton(Model(work.predict), loss)

    def factors(params: PyTree, batch: dict[str, jax.Array]) -> FactorSums:
        evaluation = Evaluation(batch)
        blocks = curvature.blocks(params, evaluation)
        linearization = curvature.linearize(params, evaluation, Needs(factors=True))
        return measured(blocks, linearization, MonteCarloFisher(), jax.random.key(0), WeightSharing.EXPAND)[0]

    return factors


def _rows(
    suite: str,
    case: str,
    work: Workload,
    size: int,
    functions: dict[str, _Function],
    goals: dict[str, float],
    quick: bool,
) -> list[Row]:
    params, batch = work.params(), work.batch(size)
    memory, timed, x = [], [], f"batch {size}"
    for name, function in functions.items():
        compiled = jax.jit(function).lower(params, batch).compile()
        base = None if name == GRADIENT else GRADIENT
        step = _step(compiled, params, batch)
        timed.append(run.Candidate(name, step, lambda: None, baseline=base, goal=goals.get(name)))
        mib = libraries.temp_bytes(compiled) / 2**20
        memory.append(Row(suite, case, name, "MiB temp", x, mib, mib, mib))
    # Apart: what takes seconds and a gigabyte leaves cache and pages in a state that the next call pays for.
    quick_ones = run.time_all([c for c in timed if c.name not in SLOW], 2 if quick else 40, budget=5)
    rows = run.rows(suite, case, x, quick_ones, metric="ms")
    if any(c.name in SLOW for c in timed):
        beside = [dataclasses.replace(c, untimed=0 if c.name in SLOW else 3) for c in timed if _beside(c)]
        rows += run.rows(suite, case, x, run.time_all(beside, 2 if quick else 10, budget=8), metric="ms")[1:]
    return [*rows, *memory]


def _beside(candidate: run.Candidate) -> bool:
    return candidate.name == GRADIENT or candidate.name in SLOW


def _step(compiled: Any, params: PyTree, batch: Any) -> libraries.Step:
    return lambda _: compiled(params, batch)
