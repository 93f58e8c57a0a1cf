"""Kinds of blocks by rule: each is what its name says of the dense Gauss-Newton matrix, in sums, steps and the plan."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import curvax
from curvax.curvature import GeneralizedGaussNewton
from curvax.losses import SquaredError
from curvax.structure import BlockKind, BlockRule
from tests.oracle.compiling import quick_jit
from tests.structure.kronecker_models import Problem, normal

pytestmark = pytest.mark.usefixtures("x64")
LAM = 0.1
FULL, DIAGONAL = BlockKind.FULL, BlockKind.DIAGONAL


def predict(p, x):
    h = jnp.tanh(x @ p["w"] + p["b"]) * p["gain"] + p["free"] ** 2
    return h @ p["v"] + p["c"]


def problem():
    shapes = {"b": (4,), "c": (3,), "free": (4,), "gain": (4,), "v": (4, 3), "w": (5, 4)}
    params = {name: normal(i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    return Problem(predict, params, {"x": normal(7, 2, 3, 5), "y": normal(8, 2, 3, 3)})


def direction(of, preset, rules):
    """(step of exact factors, plan)."""
    method = preset(
        predict_fn=of.predict,
        loss=SquaredError(),
        blocks=rules,
        fisher=GeneralizedGaussNewton(),
        beta1=0.0,
        factor_decay=0.0,
        inverse_every=1,
        lam_policy="const",
        lam0=LAM,
        learning_rate=1.0,
    )
    state = method.init(of.params, batch=of.batch)
    new, _, _ = quick_jit(method.step)(of.params, of.batch, state, jax.random.key(0))
    step = jax.tree.map(lambda a, b: np.asarray(a - b), of.params, new)
    return step, method.plan_for(of.params, of.batch).explain()


def test_each_kind_is_its_part_of_the_dense_matrix():
    """Weights and a folded bias full, a gain full, a leaf of explicit rows scaled, and a bias diagonal."""
    of = problem()
    rules = (
        BlockRule(BlockKind.SCALED_IDENTITY, r"free"),
        BlockRule(DIAGONAL, r"'b'"),
        BlockRule(FULL, r"gain|'w'|'c'", largest=20),
    )
    found, plan = direction(of, curvax.ekfac, rules)
    truth = of.truth()
    _, unravel = ravel_pytree(of.params)
    numbers = unravel(jnp.arange(len(truth.ggn), dtype=jnp.float64))
    for name in ("w", "gain", "c", "b", "free"):
        places = np.asarray(numbers[name]).astype(int).ravel()
        own, gradient = truth.ggn[np.ix_(places, places)], truth.gradient[places]
        if name == "b":
            own = np.diag(np.diag(own))
        if name == "free":
            own = np.eye(len(places)) * np.trace(own) / len(places)
        expected = np.linalg.solve(own + LAM * np.eye(len(places)), gradient)
        np.testing.assert_allclose(found[name].ravel(), expected, rtol=1e-8, atol=1e-12)
    assert "['w']: full 20 x 20: a rule for leaves like" in plan
    assert "['free']: scaled identity: a rule for leaves like 'free'" in plan
    assert "['b']: diagonal: a rule for leaves like" in plan and "['v']: Kronecker factors 4 x 4 and 3 x 3" in plan


def test_rules_are_for_parts_of_a_leaf_too():
    """A slice has a name of its own, and a rule may ask for small ones alone."""
    of = problem()
    flat, unravel = ravel_pytree(of.params)
    raveled = Problem(lambda p, x: predict(unravel(p["all"]), x), {"all": flat}, of.batch)
    first = direction(of, curvax.kfac, (BlockRule(FULL, largest=4),))[0]
    second, plan = direction(raveled, curvax.kfac, (BlockRule(FULL, largest=4),))
    np.testing.assert_allclose(second["all"], ravel_pytree(first)[0], rtol=1e-8, atol=1e-12)
    assert "[11:15] full 4 x 4: a rule of at most 4 entries" in plan


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BlockRule(FULL, "("), "regular expression"),
        (lambda: BlockRule(FULL, largest=0), "1 or more"),
        (lambda: direction(problem(), curvax.kfac, (BlockRule(FULL, "nothing"),)), "no leaf fits the rule"),
    ],
)
def test_rules_that_mean_nothing_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
    with pytest.raises(TypeError, match="kind"):
        BlockRule("full")  # type: ignore[arg-type]
