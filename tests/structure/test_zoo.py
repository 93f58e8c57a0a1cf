"""Over a zoo of models: what each leaf is recognized as, and that everything made of the factors is right."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax.losses import SquaredError
from curvax.structure import (
    empirical_fisher_diagonal,
    ggn_diagonal,
    jacobian_gram,
    per_example_gradient_norms,
    report,
)
from curvax.structure.capture import Capture, Factors, capture
from curvax.structure.formed import formed, uses_by_leaf
from curvax.structure.gram import RowGroups, gram
from curvax.structure.layers import layers
from curvax.structure.squares import squared_norms, squared_rows
from tests.oracle import dense
from tests.oracle.compiling import quick_jit
from tests.structure.zoo import ZOO, Entry, paths

pytestmark = pytest.mark.usefixtures("x64")
IN_BLOCKS = ("mlp", "depthwise convolution", "tied table", "stacked layers on positions", "scaled twice", "cond")
FAST = pytest.mark.fast


def _factors(captured: Capture, leaves: list[jax.Array], inputs: jax.Array, outputs: Any) -> Factors:
    """Of the Jacobian's rows for a batch."""
    count = int(np.prod(outputs.shape[1:]))
    eye = jnp.eye(count, dtype=outputs.dtype).reshape(count, 1, *outputs.shape[1:])
    return captured.batch(leaves, [inputs], jnp.broadcast_to(eye, (count, *outputs.shape)))


def _rows(captured: Capture, leaves: list[jax.Array], factors: Factors) -> list[jax.Array]:
    """Rows of one example, per leaf (R, *leaf)."""
    by_leaf: dict[int, jax.Array] = dict(zip(captured.structure.explicit, factors.explicit, strict=True))
    for leaf, indices in uses_by_leaf(captured).items():
        uses = [captured.structure.uses[i] for i in indices]
        a, d = ([side[i] for i in indices] for side in (factors.activations, factors.cotangents))
        by_leaf[leaf] = formed(uses, a, d)
        for use, cotangents in zip(uses, d, strict=True):
            if use.bias is not None:
                by_leaf[use.bias.leaf] = jax.vmap(use.bias.to_leaf)(jnp.sum(cotangents, axis=1))
    (count,) = {rows.shape[0] for rows in by_leaf.values()}
    return [by_leaf.get(i, jnp.zeros((count, *leaf.shape), leaf.dtype)) for i, leaf in enumerate(leaves)]


@dataclass(frozen=True)
class Studied:
    """A model's structure, what was made of it, and the oracle's Jacobian.

    For each use a random block and row, and what `from_leaf` makes of the leaf and `to_leaf` of the block or the row.
    """

    captured: Capture
    made: dict[str, np.ndarray]
    jacobian: np.ndarray
    blocks: list[tuple[np.ndarray, np.ndarray]]
    pairs: list[tuple[jax.Array, jax.Array]]


@functools.cache
def studied(entry: Entry) -> Studied:
    """All of an entry, made once."""
    return study(entry.predict, entry.params(), entry.batch())


def study(predict: Callable[[Any, Any], jax.Array], params: Any, x: jax.Array) -> Studied:
    """All of a model in one compilation, from one evaluation of its factors."""
    outputs = jax.eval_shape(predict, params, x)
    captured = capture(predict, params, x)
    uses, rng = captured.structure.uses, np.random.default_rng(0)
    blocks = [(rng.standard_normal(use.block), rng.standard_normal((use.block[0], use.block[2]))) for use in uses]

    def pairs(leaves: list[Any], blocks: list[Any]) -> list[tuple[jax.Array, jax.Array]]:
        found = []
        for use, (block, row) in zip(uses, blocks, strict=True):
            found.append((use.from_leaf(leaves[use.leaf]), use.to_leaf(block)))
            if use.bias is not None:
                found.append((use.bias.from_leaf(leaves[use.bias.leaf]), use.bias.to_leaf(row)))
        return found

    def everything(params: Any, x: jax.Array, blocks: list[Any]) -> tuple[dict[str, Any], Any]:
        leaves = jax.tree.leaves(params)
        factors = _factors(captured, leaves, x, outputs)
        examples, count = x.shape[0], outputs.size // x.shape[0]
        each = jax.vmap(lambda f: layers(captured, f))(factors)
        groups = RowGroups(examples, count, captured.dtype, lambda i: jax.tree.map(lambda layer: layer[i], each))
        rows = jax.vmap(lambda f: _rows(captured, leaves, f))(factors)
        return {
            "rows": jnp.concatenate([r.reshape(examples, count, -1) for r in rows], axis=2),
            "gram": gram(groups, 1 << 30),
            "squares": squared_rows(captured, factors, [leaf.shape for leaf in leaves]),
            "norms": squared_norms(captured, factors),
        }, pairs(leaves, blocks)

    made, found = quick_jit(everything)(params, x, blocks)
    jacobian = dense.outputs_and_jacobian(predict, params, x)[1]
    return Studied(captured, {name: dense.vector(value) for name, value in made.items()}, jacobian, blocks, found)


def close(got: Any, want: Any, tolerance: float) -> None:
    """Within a tolerance relative to the largest entry."""
    want = np.ravel(want)
    np.testing.assert_allclose(np.ravel(got), want, rtol=tolerance, atol=tolerance * np.abs(want).max())


@pytest.mark.parametrize("entry", [pytest.param(e, marks=FAST if e.name in IN_BLOCKS else ()) for e in ZOO], ids=str)
class TestZoo:
    """One model after another, so that each is computed once."""

    def test_each_leaf_has_its_rule(self, entry: Entry) -> None:
        params, x = entry.params(), entry.batch()
        leaves = report(entry.predict, params, x)
        rules = {path: leaf.rule for path, leaf in zip(paths(params), leaves, strict=True)}
        assert rules == dict(entry.rules), [str(leaf) for leaf in leaves]

    def test_its_factors_are_the_jacobian(self, entry: Entry) -> None:
        jacobian = studied(entry).jacobian
        assert np.isfinite(jacobian).all() and np.abs(jacobian).max() > 0
        close(studied(entry).made["rows"], jacobian, entry.tolerance)

    def test_its_gram_is_the_jacobians(self, entry: Entry) -> None:
        jacobian = studied(entry).jacobian
        close(studied(entry).made["gram"], jacobian @ jacobian.T, 4 * entry.tolerance)

    def test_its_sums_of_squares_are_the_jacobians(self, entry: Entry) -> None:
        squares = np.square(studied(entry).jacobian)
        close(studied(entry).made["squares"], squares.sum(0), 4 * entry.tolerance)
        close(studied(entry).made["norms"], squares.sum(1), 4 * entry.tolerance)

    def test_from_leaf_and_to_leaf_are_adjoint(self, entry: Entry) -> None:
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(entry.params())]
        results = iter(studied(entry).pairs)
        for use, (block, row) in zip(studied(entry).captured.structure.uses, studied(entry).blocks, strict=True):
            there, back = (np.asarray(x) for x in next(results))
            assert there.shape == use.block and back.shape == leaves[use.leaf].shape
            close(np.vdot(there, block), np.vdot(leaves[use.leaf], back), 1e-12)
            if use.bias is not None:
                there, back = (np.asarray(x) for x in next(results))
                close(np.vdot(there, row), np.vdot(leaves[use.bias.leaf], back), 1e-12)


@pytest.mark.parametrize("entry", [entry for entry in ZOO if entry.name in IN_BLOCKS], ids=str)
def test_exact_quantities_in_little_memory(entry: Entry) -> None:
    """Of half the sum of squares, whose residual is the output; positions count as examples in the Fisher."""
    params, x, jacobian = entry.params(), entry.batch(), studied(entry).jacobian
    outputs = np.asarray(entry.predict(params, x))
    problem = (entry.predict, SquaredError(reduction="sum"), params, x, jnp.zeros(outputs.shape))
    made = quick_jit(
        lambda: (
            jacobian_gram(entry.predict, params, x, max_bytes=1),
            ggn_diagonal(*problem, max_bytes=1),
            empirical_fisher_diagonal(*problem, max_bytes=1),
            per_example_gradient_norms(*problem),
            per_example_gradient_norms(*problem, max_bytes=1),
            per_example_gradient_norms(*problem, max_bytes=20_000),
        )
    )()
    values = [dense.vector(value) for value in made]
    residual = outputs.ravel()[:, None] * jacobian
    positions = residual.reshape(-1, outputs.shape[-1], jacobian.shape[1]).sum(1)
    examples = residual.reshape(len(outputs), -1, jacobian.shape[1]).sum(1)
    close(values[0], jacobian @ jacobian.T, 1e-10)
    close(values[1], np.square(jacobian).sum(0), 1e-10)
    close(values[2], np.square(positions).sum(0), 1e-10)
    for norms in values[3:]:
        close(norms, np.linalg.norm(examples, axis=1), 1e-10)
