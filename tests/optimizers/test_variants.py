"""Variants of SOAP, Shampoo and Muon, each against its paper's formulas in float64 NumPy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from curvax.optimizers import (
    DION,
    JORDAN,
    POLAR_EXPRESS,
    BasisMethod,
    ByPath,
    FactorTerms,
    MatrixAxes,
    NoScale,
    RmsScale,
    Sides,
    WidthScale,
    muon_adamw,
    scale_by_muon,
    scale_by_shampoo,
    scale_by_soap,
)
from tests.oracle.optimizers import Soap, adam_by_hand, kl_shampoo_by_hand, muon_by_hand, power
from tests.oracle.optimizers import updates as run


def history(shape: tuple[int, ...], count: int = 7, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape) for _ in range(count)]


KL = FactorTerms.KULLBACK_LEIBLER
SOAPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "eigenvalue-corrected Shampoo": ({"b1": 0.0}, {"b1": 0.0}),
    "KL-SOAP": ({"terms": KL}, {"kl": True}),
    "bases by eigendecomposition": ({"basis": BasisMethod.EIGENDECOMPOSITION}, {"exact": True}),
    "start": ({"start": 3}, {"start": 3}),
    "rows": ({"sides": Sides.ROWS, "terms": KL}, {"sides": (0,), "kl": True}),
    "shorter side": ({"sides": Sides.SHORTER, "start": 2}, {"sides": (1,), "start": 2}),
}


@pytest.mark.parametrize(("options", "expected"), SOAPS.values(), ids=SOAPS)
def test_soap(options: dict[str, Any], expected: dict[str, Any], x64: None) -> None:
    # The first gradient leaves one direction of the rows open, which is a basis of itself.
    grads = history((4, 3))
    numbers = {"b1": 0.8, "b2": 0.9, "eps": 1e-6, "every": 2}
    found = run(scale_by_soap(**{**numbers, **options}), [jnp.asarray(g) for g in grads])
    oracle = Soap(**{**numbers, **expected})
    for t, update in enumerate(found, 1):
        np.testing.assert_allclose(update, oracle.last(grads[:t]), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("every", [1, 3])
def test_kl_shampoo(every: int, x64: None) -> None:
    grads = history((5, 3))
    found = run(scale_by_shampoo(b2=0.9, eps=1e-2, every=every, terms=KL), [jnp.asarray(g) for g in grads])
    for t, update in enumerate(found, 1):
        np.testing.assert_allclose(update, kl_shampoo_by_hand(grads[:t], 0.9, 1e-2, every), rtol=1e-8)
    small = run(scale_by_shampoo(b2=0.9, eps=1e-2, every=every, terms=KL), [jnp.asarray(g) / 2**20 for g in grads])
    np.testing.assert_allclose(small[-1], found[-1], rtol=1e-9)


def test_one_sided_shampoo_and_its_start(x64: None) -> None:
    grads = history((5, 3))
    with jax.numpy_dtype_promotion("standard"):
        tx = scale_by_shampoo(eps=1e-2, sides=Sides.SHORTER, start=2, graft=optax.sgd(-1.0))
        found = run(tx, [jnp.asarray(g) for g in grads])
    for t, (update, g) in enumerate(zip(found, grads, strict=True)):
        factor = np.sum([x.T @ x for x in grads[: t + 1]], axis=0)
        direction = g @ power(factor + 1e-2 * np.mean(np.diag(factor)) * np.eye(3), -0.5)
        expected = g if t < 2 else direction * np.linalg.norm(g) / np.linalg.norm(direction)
        np.testing.assert_allclose(update, expected, rtol=1e-8)


@pytest.mark.parametrize("make", [scale_by_soap, scale_by_shampoo], ids=["soap", "shampoo"])
def test_blocks_step_as_matrices_of_their_own(make: Any, x64: None) -> None:
    grads = history((2, 3, 5), 3)
    found = run(make(every=2, block_dim=3), [jnp.asarray(g) for g in grads])
    edges = {"rows": [(0, 3)], "columns": [(0, 3), (3, 5)]}
    places = [(slice(*r), slice(*c)) for r in edges["rows"] for c in edges["columns"]]
    alone = run(make(every=2), [[jnp.asarray(g[:, r, c]) for r, c in places] for g in grads])
    for update, blocks in zip(found, alone, strict=True):
        for (r, c), block in zip(places, blocks, strict=True):
            np.testing.assert_allclose(update[:, r, c], block, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("nesterov", "iteration", "scale", "factor"),
    [
        (True, JORDAN, WidthScale(), (8 / 5) ** 0.5),
        (False, DION, RmsScale(), 0.2 * 8**0.5),
        (True, POLAR_EXPRESS, NoScale(), 1),
    ],
    ids=["Jordan's", "Dion's", "Polar Express"],
)
def test_muon(nesterov: bool, iteration: Any, scale: Any, factor: float, x64: None) -> None:
    grads = history((5, 8), 3)
    tx = scale_by_muon(beta=0.8, nesterov=nesterov, iteration=iteration, scale=scale)
    found = run(tx, [{"w": jnp.asarray(g), "t": jnp.asarray(g.T)} for g in grads])
    for t, update in enumerate(found, 1):
        expected = muon_by_hand(grads[:t], 0.8, nesterov, iteration.coefficients)
        np.testing.assert_allclose(update["w"], factor * expected, rtol=1e-9, atol=1e-12)
        shrunk = 1 if isinstance(scale, WidthScale) else factor
        np.testing.assert_allclose(update["t"], shrunk * expected.T, rtol=1e-9, atol=1e-12)
    if iteration is POLAR_EXPRESS:
        values = np.geomspace(2e-3, 1, 200)
        for a, b, c in iteration.coefficients:
            values = a * values + b * values**3 + c * values**5
        np.testing.assert_allclose(values, 1, atol=1e-4)


def test_queries_keys_and_values_in_one_array_are_three_matrices(x64: None) -> None:
    grads = history((6, 10), 2)
    rule = ByPath({"qkv": MatrixAxes((0,), (1,), column_parts=(6, 2, 2))})
    found = run(scale_by_muon(matrices=rule), [{"qkv": jnp.asarray(g)} for g in grads])
    for part, width in ((slice(0, 6), 1.0), (slice(6, 8), 1.0), (slice(8, 10), 1.0)):
        expected = muon_by_hand([g[:, part] for g in grads], 0.95, True, JORDAN.coefficients)
        np.testing.assert_allclose(found[-1]["qkv"][:, part], width * expected, rtol=1e-9, atol=1e-12)


def test_muon_with_adamw_and_weight_decay(x64: None) -> None:
    grads = {"w": history((4, 3), 3), "b": history((3,), 3)}
    tx = muon_adamw(0.1, adamw_learning_rate=0.01, weight_decay=0.3, scale=RmsScale(0.5), b1=0.8, b2=0.9)
    steps = [{name: jnp.asarray(of[t]) for name, of in grads.items()} for t in range(3)]
    with jax.numpy_dtype_promotion("standard"):
        found = run(tx, steps)
    muon = 0.5 * 4**0.5 * muon_by_hand(grads["w"], 0.95, True, JORDAN.coefficients)
    np.testing.assert_allclose(found[-1]["w"], -0.1 * (muon + 0.3 * grads["w"][0]), rtol=1e-9)
    adam = adam_by_hand(grads["b"], 0.8, 0.9, 1e-8)
    np.testing.assert_allclose(found[-1]["b"], -0.01 * (adam + 0.3 * grads["b"][0]), rtol=1e-6)


def test_choices_that_do_not_go_together() -> None:
    with pytest.raises(ValueError, match=r"averages its terms: pass b2=0\.95"):
        scale_by_shampoo(terms=KL)
    with pytest.raises(ValueError, match="start needs graft="):
        scale_by_shampoo(start=3)
    with pytest.raises(ValueError, match=r"b \(3,\) is no matrix: label it"):
        scale_by_muon().init({"b": jnp.ones(3)})
