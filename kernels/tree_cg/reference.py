"""tree_cg in plain JAX: any platform, any floating dtypes."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from curvax.tree import PyTree, scalar_dtype, vdot


def cg_update(
    alpha: jax.Array, lam: jax.Array, x: PyTree, p: PyTree, r: PyTree, q: PyTree
) -> tuple[PyTree, PyTree, jax.Array]:
    """See `api.cg_update`; <r, r> is taken of the residual as it is stored."""
    new_x = _add_scaled(alpha, p, x)
    new_r = _add_scaled(-alpha, _add_scaled(lam, p, q), r)
    return new_x, new_r, vdot(new_r, new_r)


def cg_direction(beta: jax.Array, z: PyTree, p: PyTree) -> PyTree:
    """See `api.cg_direction`."""
    return _add_scaled(beta, p, z)


def dots(pairs: Sequence[tuple[PyTree, PyTree]]) -> tuple[jax.Array, ...]:
    """See `api.dots`."""
    return tuple(vdot(a, b) for a, b in pairs)


def _add_scaled(scalar: jax.Array, x: PyTree, y: PyTree) -> PyTree:
    """Y + scalar x, computed in the scalar dtype (float32 or wider) and rounded once to the dtype of y."""
    accumulation = scalar_dtype(y)
    return jax.tree.map(lambda a, b: (b.astype(accumulation) + scalar * a.astype(accumulation)).astype(b.dtype), x, y)
