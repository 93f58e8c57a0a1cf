"""Sums of squared rows, and norms of rows, from the factors of several examples.

A row of one position is a d^T, and its square a^2 (d^2)^T: rows of one example share a, so that all of them cost one
product of squared vectors. Rows of several positions, or of a leaf with several layer uses, are formed before they are
squared, one example after another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from curvax.structure.capture import Capture, Factors
from curvax.structure.formed import formed, uses_by_leaf
from curvax.structure.uses import EmbeddingUse, LayerUse

_HIGHEST = jax.lax.Precision.HIGHEST


def squared_rows(capture: Capture, factors: Factors, shapes: Sequence[tuple[int, ...]]) -> list[jax.Array]:
    """Per leaf the sum of its squared rows over all rows and examples.

    Args:
      capture: the model.
      factors: of several examples: arrays with a leading axis.
      shapes: of the leaves.
    """
    total = [jnp.zeros(shape, capture.dtype) for shape in shapes]
    for i, rows in zip(capture.structure.explicit, factors.explicit, strict=True):
        total[i] = jnp.sum(jnp.square(rows.astype(capture.dtype)), axis=(0, 1))
    for leaf, indices in uses_by_leaf(capture).items():
        uses = [capture.structure.uses[i] for i in indices]
        a, d = [factors.activations[i] for i in indices], [factors.cotangents[i] for i in indices]
        total[leaf] = _leaf(uses, a, d).reshape(shapes[leaf])
        for use, cotangents in zip(uses, d, strict=True):
            if use.bias is not None:
                # (B, R, T, G, m): the rows of a bias are sums over positions.
                outputs = jnp.sum(jnp.square(jnp.sum(cotangents, axis=2)), axis=(0, 1))
                total[use.bias.leaf] = use.bias.to_leaf(outputs)
    return total


def _leaf(uses: Sequence[LayerUse], a: Sequence[jax.Array], d: Sequence[jax.Array]) -> jax.Array:
    use = uses[0]
    if len(uses) == 1 and use.positions == 1:
        outputs = jnp.sum(jnp.square(d[0][:, :, 0]), axis=1)
        if isinstance(use, EmbeddingUse):
            return _square_to_leaf(use, _scattered(a[0][:, 0], outputs[:, 0], use.block[1])[None])
        inputs = jnp.square(a[0][:, 0])
        return _square_to_leaf(use, jnp.einsum("bgn,bgm->gnm", inputs, outputs, precision=_HIGHEST))
    if len(uses) == 1 and isinstance(use, EmbeddingUse):
        sums = jnp.sum(jax.vmap(lambda i, e: _lookups(i, e, use.block[1]))(a[0], d[0]), axis=0)
        return _square_to_leaf(use, sums[None])

    def example(total: jax.Array, factors: tuple[list[jax.Array], list[jax.Array]]) -> tuple[jax.Array, None]:
        return total + jnp.sum(jnp.square(formed(uses, *factors)), axis=0), None

    zero = jax.eval_shape(lambda x, y: formed(uses, [v[0] for v in x], [v[0] for v in y])[0], list(a), list(d))
    return jax.lax.scan(example, jnp.zeros(zero.shape, zero.dtype), (list(a), list(d)))[0]


def _square_to_leaf(use: LayerUse, squares: jax.Array) -> jax.Array:
    """A sum of squares over the block, on the leaf: scales on the way there count twice."""
    return use.squared().to_leaf(squares)


def _scattered(indices: jax.Array, values: jax.Array, rows: int) -> jax.Array:
    """(rows, m) sums of values (B, m) by index; an index past the end finds nothing."""
    return jnp.zeros((rows, values.shape[-1]), values.dtype).at[indices].add(values, mode="drop")


def _lookups(indices: jax.Array, d: jax.Array, rows: int) -> jax.Array:
    """Squared rows of one example's lookups (T,) with cotangents (R, T, 1, m).

    Positions with the same index add up before they are squared; the first of them speaks for all.
    """
    same = indices[:, None] == indices[None, :]
    sums = jnp.einsum("tu,rum->rtm", same.astype(d.dtype), d[:, :, 0], precision=_HIGHEST)
    first = ~jnp.any(jnp.tril(same, -1), axis=1)
    squares = jnp.sum(jnp.square(sums), axis=0) * first[:, None].astype(d.dtype)
    return _scattered(indices, squares, rows)


def squared_norms(capture: Capture, factors: Factors) -> jax.Array:
    """(B, R) squared norms of all rows, over all leaves."""
    norms = [jnp.sum(jnp.square(x.astype(capture.dtype)), axis=tuple(range(2, x.ndim))) for x in factors.explicit]
    for indices in uses_by_leaf(capture).values():
        uses = [capture.structure.uses[i] for i in indices]
        a, d = [factors.activations[i] for i in indices], [factors.cotangents[i] for i in indices]
        norms.append(_leaf_norms(uses, a, d))
        norms += [
            jnp.sum(jnp.square(jnp.sum(e, axis=2)), axis=(2, 3))
            for use, e in zip(uses, d, strict=True)
            if use.bias is not None
        ]
    return sum(norms[1:], norms[0])


def _leaf_norms(uses: Sequence[LayerUse], a: Sequence[jax.Array], d: Sequence[jax.Array]) -> jax.Array:
    use, t = uses[0], uses[0].positions
    _, n, m = use.block
    if len(uses) == 1 and (isinstance(use, EmbeddingUse) or t * (n + m) <= n * m):
        # |sum_t a_t d_t^T|^2 = sum_tu (a_t . a_u) (d_t . d_u), without the rows.
        if isinstance(use, EmbeddingUse):
            same = (a[0][:, :, None] == a[0][:, None, :]) & (a[0] < n)[:, None, :]
            inner = same[:, None].astype(d[0].dtype)
        else:
            inner = jnp.einsum("btgn,bugn->bgtu", a[0], a[0], precision=_HIGHEST)
        outer = jnp.einsum("brtgm,brugm->brgtu", d[0], d[0], precision=_HIGHEST)
        return use.factor**2 * jnp.einsum("bgtu,brgtu->br", inner, outer, precision=_HIGHEST)
    axes = tuple(range(1, 1 + len(jax.eval_shape(use.to_leaf, jax.ShapeDtypeStruct(use.block, d[0].dtype)).shape)))

    def example(factors: tuple[list[jax.Array], list[jax.Array]]) -> jax.Array:
        return jnp.sum(jnp.square(formed(uses, *factors)), axis=axes)

    return jax.lax.map(example, (list(a), list(d)))


def formed_bytes(capture: Capture, shapes: Sequence[tuple[int, ...]], rows: int) -> int:
    """Bytes of the largest formed rows of one example."""
    several = [
        math.prod(shapes[leaf])
        for leaf, indices in uses_by_leaf(capture).items()
        if len(indices) > 1 or capture.structure.uses[indices[0]].positions > 1
    ]
    return rows * max(several, default=0) * capture.dtype.itemsize
