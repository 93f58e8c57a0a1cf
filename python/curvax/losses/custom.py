"""A loss given as a function of one position."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, final

import jax
import jax.numpy as jnp

from curvax.kernels.dense_linalg import eigh
from curvax.losses.base import Loss, Shaped, accumulation_dtype, append_axes, positions_shape, root, shaped, weigh
from curvax.tree import PyTree

RowFunction = Callable[[jax.Array, PyTree], jax.Array]
RowSampler = Callable[[jax.Array, jax.Array], PyTree] | Callable[[jax.Array, jax.Array, PyTree], PyTree]


@final
@dataclasses.dataclass(frozen=True)
class CustomLoss(Loss):
    """l(f, y) = function(f, y) for the outputs f and the target y of *one* position; derivatives are automatic.

    Targets are any pytree whose leaves have the positions' axes first. The function sees f of shape (K,), upcast (a
    scalar where outputs have shape (B,)), and the target's leaves without the positions' axes, floating ones cast to
    the dtype of f. Before it is called, outputs at positions of zero weight are set to zero.

    The Hessian product is that of the function, convex or not. The factor is the symmetric square root of the
    *non-negative part* of the K x K Hessian, from its eigendecomposition: S S^T = Q exactly where the function is
    convex in f, and the nearest positive semidefinite matrix elsewhere. It costs O(K^3) for each position.

    Attributes:
      function: (f, y) -> real scalar, twice differentiable in f.
      sampler: (key, f) -> y, draws the target of one position from the model's predictive distribution; or (key, f, y)
        -> y, which sees the observed target, for the part of it that is no observation (which of several outputs count
        here). Needed only where targets are sampled (Monte Carlo Fisher, Gauss-Newton-Bartlett). Default `None`: cannot
        sample.
      reduction: see `Loss`.
    """

    function: RowFunction
    sampler: RowSampler | None = None

    def value(self, outputs: jax.Array, targets: PyTree, weights: jax.Array) -> jax.Array:
        """See `Loss.value`."""
        f, weights = _prepare(outputs, weights)
        terms = _each_position(self._row_value, weights)(f, targets)
        return jnp.sum(weigh(weights, terms))

    def gradient(self, outputs: jax.Array, targets: PyTree, weights: jax.Array) -> jax.Array:
        """See `Loss.gradient`."""
        f, weights = _prepare(outputs, weights)
        slopes = _each_position(jax.grad(self._row_value), weights)(f, targets)
        return weigh(append_axes(weights, f.ndim), slopes)

    def hessian_product(self, outputs: jax.Array, targets: PyTree, weights: jax.Array, v: jax.Array) -> jax.Array:
        """See `Loss.hessian_product`."""
        f, weights = _prepare(outputs, weights)

        def row_product(row: jax.Array, target: PyTree, v_row: jax.Array) -> jax.Array:
            return jax.jvp(lambda r: jax.grad(self._row_value)(r, target), (row,), (v_row,))[1]

        products = _each_position(row_product, weights)(f, targets, v.astype(f.dtype))
        return weigh(append_axes(weights, f.ndim), products)

    def factor(self, outputs: jax.Array, targets: PyTree, weights: jax.Array, u: jax.Array) -> jax.Array:
        """S u = sqrt(w) [H]_+^(1/2) u; see `Loss.factor`."""
        f, weights = _prepare(outputs, weights)
        rows = _each_position(self._row_factor, weights)(f, targets, u.astype(f.dtype))
        return weigh(append_axes(root(weights), f.ndim), rows)

    def factor_transpose(self, outputs: jax.Array, targets: PyTree, weights: jax.Array, v: jax.Array) -> jax.Array:
        """See `Loss.factor_transpose`; S is symmetric."""
        return self.factor(outputs, targets, weights, v)

    def gradient_in_rows(self, outputs: jax.Array, targets: PyTree, weights: jax.Array) -> None:
        """`None`: the gradient of an arbitrary function need not lie in the range of S."""
        return None

    def sample_targets(self, outputs: jax.Array, targets: PyTree, key: jax.Array) -> PyTree:
        """Targets from `sampler`, with a key of its own for every position; see `Loss.sample_targets`.

        Raises:
          ValueError: there is no sampler.
        """
        if self.sampler is None:
            raise ValueError("CustomLoss cannot sample targets without a sampler: pass CustomLoss(function, sampler).")
        f = jnp.asarray(outputs)
        positions, draw = positions_shape(f), self.sampler
        operands: list[Any] = [jax.random.split(key, positions), f.astype(accumulation_dtype(f.dtype))]
        if _required(draw) > 2:
            operands.append(_cast_floats(targets, operands[1].dtype))
        for _ in positions:
            draw = jax.vmap(draw)
        return draw(*operands)

    def _row_value(self, row: jax.Array, target: PyTree) -> jax.Array:
        return jnp.asarray(self.function(row, _cast_floats(target, row.dtype))).astype(row.dtype)

    def _row_factor(self, row: jax.Array, target: PyTree, u: jax.Array) -> jax.Array:
        hessian = jax.hessian(self._row_value)(row, target).reshape(row.size, row.size)
        pairs = eigh((hessian + hessian.T) / 2)
        values, vectors = pairs.values, pairs.vectors
        # V sqrt(D) V^T rather than V sqrt(D): it does not depend on the choice of eigenvectors, so factor and
        # factor_transpose agree even if they are compiled apart.
        scale = root(jnp.maximum(values, jnp.zeros_like(values)))
        inner = jnp.matmul(vectors.T, u.reshape(-1), precision="highest")
        return jnp.matmul(vectors, scale * inner, precision="highest").reshape(row.shape)

    def _check_targets(self, outputs: Shaped, targets: PyTree) -> None:
        positions = positions_shape(outputs)
        dtype = accumulation_dtype(outputs.dtype)

        def row_of(leaf: Any) -> jax.ShapeDtypeStruct:
            spec = shaped(leaf, "targets' leaves")
            if tuple(spec.shape[: len(positions)]) != positions:
                raise ValueError(
                    f"a leaf of the targets has shape {tuple(spec.shape)} with outputs of shape "
                    f"{tuple(outputs.shape)}: give every leaf the leading axes {positions}."
                )
            return jax.ShapeDtypeStruct(spec.shape[len(positions) :], spec.dtype)

        f = jax.ShapeDtypeStruct(tuple(outputs.shape)[len(positions) :], dtype)
        term = jax.eval_shape(
            lambda row, target: self.function(row, _cast_floats(target, dtype)), f, jax.tree.map(row_of, targets)
        )
        if not hasattr(term, "shape") or term.shape != () or not jnp.issubdtype(term.dtype, jnp.floating):
            raise ValueError(f"CustomLoss's function gives {term} for one position: return one real scalar.")


def _cast_floats(target: PyTree, dtype: Any) -> PyTree:
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, target)


def _required(function: Callable[..., Any]) -> int:
    """How many arguments a function must have by position."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return sum(p.kind in kinds and p.default is inspect.Parameter.empty for p in parameters)


def _prepare(outputs: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    f = jnp.asarray(outputs)
    f = f.astype(accumulation_dtype(f.dtype))
    weights = jnp.asarray(weights).astype(f.dtype)
    return jnp.where(append_axes(weights, f.ndim) == 0, jnp.zeros((), f.dtype), f), weights


def _each_position(function: Callable[..., jax.Array], weights: jax.Array) -> Callable[..., jax.Array]:
    # The axes of weights are the positions' axes, also inside a vmap over examples.
    for _ in range(weights.ndim):
        function = jax.vmap(function)
    return function
