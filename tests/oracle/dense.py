"""Dense curvature in float64 NumPy: Jacobian, GGN, Hessian, empirical Fisher, gradient, damped direction.

Everything takes the model function and plain arrays. The Jacobian is `jax.jacrev` in float64, so a `custom_vjp` counts
with the rule its author gave it; loss Hessians come from `oracle.losses`, the linear algebra from NumPy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .compiling import quick_jit
from .losses import OutputLoss

PyTree = Any


def to_double(tree: PyTree) -> PyTree:
    """Floating leaves as float64 NumPy arrays, all other leaves as NumPy arrays of their own dtype."""

    def convert(leaf: Any) -> np.ndarray:
        leaf = np.asarray(leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf)
        return leaf.astype(np.float64) if np.issubdtype(leaf.dtype, np.floating) else leaf

    return jax.tree.map(convert, tree)


def vector(tree: PyTree) -> np.ndarray:
    """All leaves of `tree` one after another as a float64 vector, in `jax.tree.leaves` order."""
    leaves = [np.ravel(leaf) for leaf in jax.tree.leaves(to_double(tree))]
    return np.concatenate(leaves) if leaves else np.zeros(0)


def like(flat: np.ndarray, tree: PyTree) -> PyTree:
    """The inverse of `vector`: NumPy float64 leaves with the structure and shapes of `tree`."""
    leaves, treedef = jax.tree.flatten(tree)
    ends = np.cumsum([np.size(leaf) for leaf in leaves])
    parts = [flat[e - np.size(leaf) : e].reshape(np.shape(leaf)) for e, leaf in zip(ends, leaves, strict=True)]
    return jax.tree.unflatten(treedef, parts)


def _rows(jacobian: PyTree, rows: int) -> np.ndarray:
    return np.concatenate([np.asarray(leaf).reshape(rows, -1) for leaf in jax.tree.leaves(jacobian)], axis=1)


@functools.lru_cache(maxsize=128)
def _jacobian_function(
    predict: Callable[[PyTree, Any], jax.Array],
) -> Callable[[PyTree, Any], tuple[PyTree, jax.Array]]:
    """(params, inputs) -> (Jacobian, outputs), compiled once per model."""

    def twice(params: PyTree, inputs: Any) -> tuple[jax.Array, jax.Array]:
        out = predict(params, inputs)
        return out, out

    return quick_jit(jax.jacrev(twice, has_aux=True))


def outputs_and_jacobian(
    predict: Callable[[PyTree, Any], jax.Array], params: PyTree, inputs: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Outputs, and d outputs / d params as a (number of outputs, number of parameters) matrix."""
    params, inputs = to_double(params), to_double(inputs)
    with jax.enable_x64(True):
        jacobian, outputs = _jacobian_function(predict)(params, inputs)
        outputs = np.asarray(outputs)
        return outputs, _rows(jacobian, outputs.size)


def hessian(function: Callable[[PyTree], jax.Array], params: PyTree) -> np.ndarray:
    """Explicit (n, n) Hessian of a scalar function of the parameters by `jax.hessian` in float64."""
    params = to_double(params)
    n = vector(params).size
    with jax.enable_x64(True):
        blocks = quick_jit(jax.hessian(function))(params)
        # One row of blocks per leaf; flattening a row of blocks in leaf order gives consecutive columns.
        counts = [int(np.size(leaf)) for leaf in jax.tree.leaves(params)]
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(blocks)]
    columns = len(counts)
    rows = [
        np.concatenate([leaves[i * columns + j].reshape(counts[i], counts[j]) for j in range(columns)], axis=1)
        for i in range(columns)
    ]
    return np.concatenate(rows, axis=0).reshape(n, n)


def gradient(jacobian: np.ndarray, loss: OutputLoss) -> np.ndarray:
    """J^T dL/df."""
    return jacobian.T @ loss.gradient.ravel()


def ggn(jacobian: np.ndarray, loss: OutputLoss) -> np.ndarray:
    """J^T H J with H the block-diagonal loss Hessian."""
    positions, outputs, _ = loss.hessian.shape
    rows = jacobian.reshape(positions, outputs, -1)
    return np.einsum("pka,pkl,plb->ab", rows, loss.hessian, rows)


def empirical_fisher(jacobian: np.ndarray, loss: OutputLoss) -> np.ndarray:
    """sum_i w_i g_i g_i^T with g_i = J_i^T dl_i/df_i, the gradient of one position."""
    positions, outputs = loss.gradient.shape
    per_position = np.einsum("pka,pk->pa", jacobian.reshape(positions, outputs, -1), loss.position_gradient)
    return (per_position * loss.weights[:, None]).T @ per_position


def damped_direction(curvature: np.ndarray, grad: np.ndarray, lam: float) -> np.ndarray:
    """s with (C + lam I) s = g."""
    return np.linalg.solve(curvature + lam * np.eye(len(grad)), grad)


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """|got - want| / |want| in the Euclidean norm."""
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), np.finfo(np.float64).tiny))


@dataclass(frozen=True)
class Truth:
    """Everything dense about one model, one loss and one batch.

    Attributes:
        outputs: model outputs.
        jacobian: (number of outputs, n).
        loss: value and output-space derivatives.
        gradient: (n,).
        ggn: (n, n).
    """

    outputs: np.ndarray
    jacobian: np.ndarray
    loss: OutputLoss
    gradient: np.ndarray
    ggn: np.ndarray

    def direction(self, lam: float) -> np.ndarray:
        """Damped GGN direction."""
        return damped_direction(self.ggn, self.gradient, lam)

    @property
    def empirical_fisher(self) -> np.ndarray:
        """(n, n) empirical Fisher."""
        return empirical_fisher(self.jacobian, self.loss)


def truth(
    predict: Callable[[PyTree, Any], jax.Array],
    loss: Callable[..., OutputLoss],
    params: PyTree,
    inputs: Any,
    targets: Any,
    weights: Any = None,
    reduction: str = "mean",
) -> Truth:
    """Dense GGN and gradient of `loss(predict(params, inputs), targets)`."""
    outputs, jacobian = outputs_and_jacobian(predict, params, inputs)
    at_outputs = loss(outputs, to_double(targets), None if weights is None else to_double(weights), reduction)
    return Truth(outputs, jacobian, at_outputs, gradient(jacobian, at_outputs), ggn(jacobian, at_outputs))
