"""`gram_accumulate` on one layer, beside the whole product matrices and the rows written out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from bench import run
from bench.suites.kernels.case import REFERENCE, Case, accelerated, implementations, over_and_over, repeats
from curvax.kernels.gram_accumulate import OPS, gram_accumulate, gram_of_layers
from curvax.kernels.gram_accumulate.workloads import WORKLOADS, Workload

WHOLE = "both product matrices, whole"
EXPLICIT = "explicit rows, whole"
# Rows written out may take this many bytes.
_ROOM = 1 << 29

_Call = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def cases(quick: bool) -> Iterator[Case]:
    """Every workload that suits the machine; FLOPs are those of the lower triangle, whoever does more."""
    for work in WORKLOADS[:1] if quick else WORKLOADS:
        if work.large and not accelerated():
            continue
        count = repeats(max(1, min(20, int(2e9 // work.flops))))
        yield Case(
            f"gram_accumulate, {work.name}",
            f"{work.total} rows",
            lambda work=work, count=count: _candidates(work, count),
            count,
            work.bytes,
            work.flops,
        )

    if not quick:
        flops = float(sum(_NETWORK_ROWS**2 * out + _EXAMPLES**2 * into for into, out in _NETWORK))
        size = 4.0 * (_NETWORK_ROWS**2 + sum(_NETWORK_ROWS * out + _EXAMPLES * into for into, out in _NETWORK))
        yield Case("gram_of_layers, 784-256-256-10 batch 128 x 9", f"{_NETWORK_ROWS} rows", _network, 1, size, flops)


# Widths of the layers, biases included, and softmax rows of a batch.
_NETWORK = ((785, 256), (257, 256), (257, 10))
_EXAMPLES, _PER_EXAMPLE = 128, 9
_NETWORK_ROWS = _EXAMPLES * _PER_EXAMPLE


def _network() -> list[run.Candidate]:
    """The whole symmetric matrix of a small network's rows."""
    rng = np.random.default_rng(0)
    layers = [
        (
            jnp.asarray(rng.normal(size=(_EXAMPLES, 1, 1, into)), jnp.float32),
            jnp.asarray(rng.normal(size=(_EXAMPLES, 1, _PER_EXAMPLE, 1, out)), jnp.float32),
        )
        for into, out in _NETWORK
    ]
    gram = jax.ShapeDtypeStruct((_NETWORK_ROWS, _NETWORK_ROWS), jnp.float32)
    results = []
    for name in implementations(OPS, gram):
        call = jax.jit(partial(gram_of_layers, dtype=gram.dtype, implementation=name))
        step = lambda _, call=call: call(layers)  # noqa: E731
        baseline, goal = (None, None) if name == REFERENCE else (REFERENCE, 0.6)
        results.append(run.Candidate(name, step, lambda: layers[0][0], baseline=baseline, goal=goal))
    return results


def _candidates(work: Workload, count: int) -> list[run.Candidate]:
    rng = np.random.default_rng(0)
    at = () if work.positions == 1 else (work.positions,)
    a = jnp.asarray(rng.normal(size=(work.groups, *at, work.into)), jnp.float32)
    d = jnp.asarray(rng.normal(size=(work.groups, work.per_group, *at, work.out)), jnp.float32)
    gram = jnp.zeros((work.total, work.total), jnp.float32)
    calls: dict[str, _Call] = {
        name: lambda g, a, d, name=name: gram_accumulate(g, a, d, implementation=name)
        for name in implementations(OPS, gram)
    }
    if work.positions == 1:
        calls[WHOLE] = _whole
    if 4 * work.total * work.into * work.out <= _ROOM:
        calls[EXPLICIT] = _explicit
    return [
        run.Candidate(
            name,
            _loop(call, a, d, count),
            lambda: jnp.zeros_like(gram),
            baseline=None if name == REFERENCE else REFERENCE,
            goal=1.0 if name not in (REFERENCE, WHOLE, EXPLICIT) else None,
        )
        for name, call in calls.items()
    ]


def _loop(call: _Call, a: jax.Array, d: jax.Array, count: int) -> Callable[[jax.Array], jax.Array]:
    """The call over and over, into one matrix."""
    step = over_and_over(lambda gram, fixed: call(gram, *fixed), count)
    return lambda gram: step(gram, (a, d))


def _inner(x: jax.Array) -> jax.Array:
    return jnp.einsum("in,jn->ij", x, x, precision=jax.lax.Precision.HIGHEST)


def _whole(gram: jax.Array, a: jax.Array, d: jax.Array) -> jax.Array:
    """As one writes it: A A^T with its entries repeated, times D D^T."""
    groups, per_group, _ = d.shape
    blocks = _inner(d.reshape(groups * per_group, -1)).reshape(groups, per_group, groups, per_group)
    return gram + (_inner(a)[:, None, :, None] * blocks).reshape(gram.shape)


def _explicit(gram: jax.Array, a: jax.Array, d: jax.Array) -> jax.Array:
    """The rows of the Jacobian, and their product."""
    if a.ndim == 2:
        a, d = a[:, None], d[:, :, None]
    rows = jnp.einsum("bti,brto->brio", a, d, precision=jax.lax.Precision.HIGHEST)
    return gram + _inner(rows.reshape(gram.shape[0], -1))
