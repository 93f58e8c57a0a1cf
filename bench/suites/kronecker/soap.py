"""Milliseconds of an update on the weights of a transformer of two layers, gradients given.

Each method stands beside the products that it must do: of Muon three per Newton-Schulz iteration, of SOAP two for the
factors, six into the eigenbasis and back. What is over that is traffic, and for SOAP and Shampoo the factorizations of
every tenth update.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

import bench.run as run
from bench.schema import Row
from curvax.optimizers import LastTwoAxes, scale_by_muon, scale_by_shampoo, scale_by_soap

_LAYERS, _EVERY, _ITERATIONS = 2, 10, 5
_MUON_FLOOR, _SOAP_FLOOR = "floor: Muon's products", "floor: SOAP's products"
_OPTAX_MUON = "optax.contrib.muon"


def rows(suite: str, quick: bool, only: str) -> Iterator[list[Row]]:
    """Muon's, then SOAP's and Shampoo's; those of a case take turns."""
    width = 64 if quick else 512
    for methods, candidates in (("Muon", _muon), ("SOAP and Shampoo", _soap)):
        case = f"update of {methods}, transformer of {_LAYERS} layers"
        if only in case:
            timings = run.time_all(list(candidates(width)), 3 if quick else 15, budget=300.0)
            yield run.rows(suite, case, f"width {width}", timings)


def weights(width: int) -> dict[str, tuple[int, ...]]:
    """Shapes, the layers stacked as for a scan."""
    return {
        "qkv": (_LAYERS, width, 3 * width),
        "out": (_LAYERS, width, width),
        "up": (_LAYERS, width, 4 * width),
        "down": (_LAYERS, 4 * width, width),
    }


def _muon(width: int) -> Iterator[run.Candidate]:
    stacks = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    peer = optax.contrib.muon(1.0, muon_weight_dimension_numbers=lambda p: jax.tree.map(lambda _: stacks, p))
    yield _floor(_MUON_FLOOR, _newton_schulz, width)
    yield _optimizer(_OPTAX_MUON, peer, width, _MUON_FLOOR)
    yield _optimizer("curvax muon", scale_by_muon(matrices=LastTwoAxes()), width, _OPTAX_MUON)


def _soap(width: int) -> Iterator[run.Candidate]:
    yield _floor(_SOAP_FLOOR, _bases, width)
    for name, tx in (("soap", scale_by_soap(every=_EVERY)), ("shampoo", scale_by_shampoo(every=_EVERY, b2=0.95))):
        yield _optimizer(f"curvax {name}, refreshed every {_EVERY}", tx, width, _SOAP_FLOOR, calls=_EVERY)


def _optimizer(name: str, tx: optax.GradientTransformation, width: int, baseline: str, calls: int = 1) -> run.Candidate:
    @functools.partial(jax.jit, donate_argnums=1)
    def update(gradients: Any, state: Any) -> Any:
        return tx.update(gradients, state, gradients)

    def step(carry: Any) -> Any:
        gradients, state, _ = carry
        updates, state = update(gradients, state)
        return gradients, state, updates

    def carry() -> Any:
        gradients = _gradients(width)
        return gradients, tx.init(gradients), None

    return run.Candidate(name, step, carry, calls=calls, baseline=baseline)


def _floor(name: str, products: Callable[[jax.Array], jax.Array], width: int) -> run.Candidate:
    each = jax.jit(lambda tree: jax.tree.map(products, tree))
    return run.Candidate(name, lambda carry: (carry[0], each(carry[0])), lambda: (_orthogonal(width), None))


def _newton_schulz(x: jax.Array) -> jax.Array:
    """The products of the iterations, on the shorter side."""
    x = jnp.swapaxes(x, -1, -2) if x.shape[-2] > x.shape[-1] else x
    for _ in range(_ITERATIONS):
        square = x @ jnp.swapaxes(x, -1, -2)
        x = (square @ square) @ x
    return x


def _bases(x: jax.Array) -> jax.Array:
    """Both factors, and two matrices of the gradient's shape in two bases of which one comes back."""
    left, right = x @ jnp.swapaxes(x, -1, -2), jnp.swapaxes(x, -1, -2) @ x
    return left @ (left @ (x @ right) + left @ (left @ x @ right)) @ right


def _gradients(width: int) -> dict[str, jax.Array]:
    shapes = weights(width)
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {name: jax.random.normal(key, shape) * 1e-3 for key, (name, shape) in zip(keys, shapes.items(), strict=True)}


def _orthogonal(width: int) -> dict[str, jax.Array]:
    """Matrices whose products neither grow nor shrink: subnormal numbers would take longer than others."""
    keys = dict(zip(weights(width), jax.random.split(jax.random.key(0), len(weights(width))), strict=True))
    return {
        name: jax.random.orthogonal(keys[name], rows, (layers,), m=columns)
        for name, (layers, rows, columns) in weights(width).items()
    }
