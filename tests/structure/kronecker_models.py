"""Models whose Kronecker factors can be written down by hand, and the dense matrices that factors stand for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvax import tree
from curvax.curvature import Evaluation, GaussNewton, GeneralizedGaussNewton, Model, Needs
from curvax.losses import Loss, SquaredError
from curvax.structure.blocks import KroneckerBlocks
from curvax.structure.kronecker import FactorSums, WeightSharing, factor_sums
from tests.oracle import dense, losses
from tests.oracle.compiling import quick_jit

PyTree = Any


@dataclass(frozen=True)
class Problem:
    """A model at a point, on a batch."""

    predict: Callable[[PyTree, Any], jax.Array]
    params: PyTree
    batch: dict[str, jax.Array]
    loss: Loss = SquaredError()

    @property
    def curvature(self) -> GaussNewton:
        weighted = "w" if "w" in self.batch else None
        return GaussNewton(Model(self.predict, weight_key=weighted), self.loss)

    @property
    def evaluation(self) -> Evaluation:
        return Evaluation(self.batch)

    @functools.cached_property
    def blocks(self) -> KroneckerBlocks:
        return self.curvature.blocks(self.params, self.evaluation)

    def measure(self, measure: Callable[[Any], Any], metric: Any = None, seed: int = 0) -> Any:
        """What `measure` finds on the batch, with exact rows by default."""
        return self.measuring(measure, metric, seed)(self.params, self.batch)

    def measuring(self, measure: Callable[[Any], Any], metric: Any = None, seed: int = 0) -> Callable[..., Any]:
        """(params, batch) -> what `measure` finds, compiled once."""
        metric = metric or GeneralizedGaussNewton()

        def run(params: PyTree, batch: Any) -> Any:
            at = self.curvature.linearize(params, Evaluation(batch), Needs(factors=True))
            assert at.layer_factors is not None
            return at.layer_factors(metric, jax.random.key(seed))(measure)

        return quick_jit(run)

    def sums(self, sharing: WeightSharing = WeightSharing.EXPAND, metric: Any = None, seed: int = 0) -> FactorSums:
        blocks = self.blocks
        return self.measure(lambda examples: factor_sums(blocks, examples, sharing), metric, seed)

    def samples(self, metric: Any, count: int) -> FactorSums:
        """The sums of many draws, stacked."""
        blocks = self.blocks

        def run(params: PyTree, keys: jax.Array) -> FactorSums:
            layer_factors = self.curvature.linearize(params, self.evaluation, Needs(factors=True)).layer_factors
            assert layer_factors is not None
            return jax.vmap(lambda k: layer_factors(metric, k)(lambda e: factor_sums(blocks, e, WeightSharing.EXPAND)))(
                keys
            )

        return quick_jit(run)(self.params, jax.random.split(jax.random.key(0), count))

    def factors(self, sharing: WeightSharing = WeightSharing.EXPAND) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """A and B per block."""
        sums = self.sums(sharing)
        return [np.asarray(a) for a in sums.means()], [np.asarray(b) for b in sums.outputs]

    def truth(self, kind: str = "mse") -> dense.Truth:
        oracle = {"mse": losses.squared_error, "ce": losses.softmax_cross_entropy}[kind]
        return dense.truth(self.predict, oracle, self.params, self.batch["x"], self.batch["y"], self.batch.get("w"))


def normal(seed: int, *shape: int) -> jax.Array:
    """Standard normal float64 numbers."""
    return jnp.array(np.random.default_rng(seed).standard_normal(shape))


def kronecker_matrix(
    blocks: KroneckerBlocks, inputs: Sequence[Any], outputs: Sequence[Any], like: PyTree
) -> np.ndarray:
    """The matrix on raveled parameters that all A kron B together are; zero in the rest."""
    n = tree.size(like)
    _, unravel = tree.ravel(tree.zeros_like(like))

    def on(v: jax.Array) -> jax.Array:
        leaves = jax.tree.leaves(unravel(v))
        found = [jnp.zeros_like(x) for x in leaves]
        for block, a, b in zip(blocks.kronecker, inputs, outputs, strict=True):
            x = block.take(leaves)
            left = a[..., None] * x if a.ndim == 2 else jnp.einsum("gij,gjm->gim", a, x)
            for leaf, part in block.put(jnp.einsum("gim,gml->gil", left, b)):
                found[leaf] = found[leaf] + part
        return jnp.concatenate([x.ravel() for x in found])

    return np.asarray(quick_jit(jax.vmap(on))(jnp.eye(n))).T


def owners(blocks: KroneckerBlocks, like: PyTree) -> np.ndarray:
    """(n,) for each parameter a number of its block and group; -1 outside of Kronecker blocks."""

    @quick_jit
    def numbered() -> list[jax.Array]:
        leaves = [jnp.zeros(x.shape) for x in jax.tree.leaves(like)]
        number = 0
        for block in blocks.kronecker:
            groups, n, m = block.shape
            marks = jnp.broadcast_to(jnp.arange(1, groups + 1)[:, None, None] + number, (groups, n, m)).astype(float)
            for leaf, part in block.put(marks):
                leaves[leaf] = leaves[leaf] + part
            number += groups
        return leaves

    return np.concatenate([np.asarray(x).ravel() for x in numbered()]).round().astype(int) - 1


def block_diagonal(matrix: np.ndarray, blocks: KroneckerBlocks, like: PyTree) -> np.ndarray:
    """What of a matrix lies within Kronecker blocks."""
    owner = owners(blocks, like)
    return np.where((owner[:, None] == owner[None, :]) & (owner[:, None] >= 0), matrix, 0.0)
