"""SOAP and Shampoo against their papers' formulas in float64 NumPy; Muon and AdamW by label."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from curvax.optimizers import (
    hidden_matrices,
    hidden_matrices_by_name,
    muon_adamw,
    scale_by_shampoo,
    scale_by_soap,
    shampoo,
    soap,
)
from tests.oracle.compiling import quick_jit
from tests.oracle.optimizers import adam_by_hand, shampoo_by_hand, soap_by_hand
from tests.oracle.optimizers import updates as run

STEPS = 7
SHAPES = {"matrix": (4, 3), "stack": (2, 3, 4), "vector": (5,), "scalar": (), "long": (9, 3)}


def gradients(dtype: Any = jnp.float64) -> list[dict[str, jax.Array]]:
    rng = np.random.default_rng(0)
    return [{n: jnp.asarray(rng.standard_normal(s), dtype) for n, s in SHAPES.items()} for _ in range(STEPS)]


@pytest.mark.fast
@pytest.mark.parametrize(("every", "b2"), [(1, None), (3, None), (2, 0.9)])
def test_shampoo_is_the_papers(every: int, b2: float | None, x64: None) -> None:
    grads = gradients()
    found = run(scale_by_shampoo(eps=1e-2, every=every, b2=b2, max_dim=5), grads)
    for t, updates in enumerate(found):
        for name in SHAPES:
            history = [np.asarray(g[name]) for g in grads[: t + 1]]
            if name == "stack":
                layers = [[x[i] for x in history] for i in range(2)]
                expected = np.stack([shampoo_by_hand(layer, 1e-2, every, b2, False) for layer in layers])
            else:
                history = [np.atleast_1d(x) for x in history]
                expected = shampoo_by_hand(history, 1e-2, every, b2, name == "long").reshape(SHAPES[name])
            np.testing.assert_allclose(updates[name], expected, rtol=1e-8, atol=1e-11)


def test_grafting_keeps_the_direction_and_takes_the_other_norm(x64: None) -> None:
    grads = gradients()
    plain = run(scale_by_shampoo(eps=1e-2, every=2), grads)
    with jax.numpy_dtype_promotion("standard"):
        adam = run(optax.scale_by_adam(), grads)
        grafted = run(scale_by_shampoo(eps=1e-2, every=2, graft=optax.scale_by_adam()), grads)
    for own, lender, found in zip(plain, adam, grafted, strict=True):
        for name in SHAPES:
            matrices = [np.asarray(x[name]).reshape((2, -1) if name == "stack" else (1, -1)) for x in (own, lender)]
            lengths = [np.linalg.norm(m, axis=1, keepdims=True) for m in matrices]
            expected = matrices[0] / lengths[0] * lengths[1]
            np.testing.assert_allclose(np.ravel(found[name]), expected.ravel(), rtol=1e-9)
    (still,) = run(scale_by_shampoo(graft=optax.sgd(1.0)), [{"w": jnp.zeros((2, 2))}])
    np.testing.assert_array_equal(still["w"], 0.0)


@pytest.mark.fast
@pytest.mark.parametrize("every", [1, 3])
def test_soap_is_the_papers(every: int, x64: None) -> None:
    grads = gradients()
    found = run(scale_by_soap(b1=0.8, b2=0.9, eps=1e-6, every=every, max_dim=5), grads)
    for t, updates in enumerate(found):
        for name in ("matrix", "stack", "long"):
            history = [np.asarray(g[name]) for g in grads[: t + 1]]
            if name == "stack":
                layers = [[x[i] for x in history] for i in range(2)]
                expected = np.stack([soap_by_hand(layer, 0.8, 0.9, 1e-6, every, False) for layer in layers])
            else:
                expected = soap_by_hand(history, 0.8, 0.9, 1e-6, every, name == "long")
            np.testing.assert_allclose(updates[name], expected, rtol=1e-6, atol=1e-9)


def test_soap_of_vectors_is_adam(x64: None) -> None:
    grads = [{name: g[name] for name in ("vector", "scalar")} for g in gradients()]
    found = run(scale_by_soap(b1=0.8, b2=0.9, eps=1e-3), grads)
    for t, updates in enumerate(found):
        for name, update in updates.items():
            expected = adam_by_hand([np.asarray(g[name]) for g in grads[: t + 1]], 0.8, 0.9, 1e-3)
            np.testing.assert_allclose(update, expected, rtol=1e-9)


def test_soap_in_a_fixed_eigenbasis_is_adam_there(x64: None) -> None:
    """Gradients that share singular vectors: rotating every one of them rotates every update."""
    rng = np.random.default_rng(1)
    u, v = np.linalg.qr(rng.standard_normal((4, 4)))[0], np.linalg.qr(rng.standard_normal((3, 3)))[0]
    diagonal = [np.eye(4, 3) * np.asarray([5.0, 2.0, 1.0]) * rng.uniform(0.9, 1.1, 3) for _ in range(5)]
    with jax.numpy_dtype_promotion("standard"):
        adam = run(optax.scale_by_adam(0.95, 0.95, 1e-8), [jnp.asarray(d) for d in diagonal])
    found = run(scale_by_soap(every=1), [jnp.asarray(u @ d @ v.T) for d in diagonal])
    for a, b in zip(found, adam, strict=True):
        np.testing.assert_allclose(a, u @ np.asarray(b) @ v.T, atol=1e-6)


@pytest.mark.parametrize("make", [soap, shampoo])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_they_scan_in_narrow_dtypes_and_lower_a_loss(make: Any, dtype: Any) -> None:
    target = jnp.asarray(np.random.default_rng(2).standard_normal((4, 3)), dtype)
    tx = make(0.05)

    def loss(p: Any) -> jax.Array:
        return jnp.mean(jnp.square((p["w"] - target).astype(jnp.float32))) + jnp.square(p["b"].astype(jnp.float32))[0]

    def step(carry: Any, _: None) -> Any:
        p, s = carry
        u, s = tx.update(jax.grad(loss)(p), s, p)
        return (jax.tree.map(lambda x, d: x + d.astype(x.dtype), p, u), s), loss(p)

    params = {"w": jnp.zeros((4, 3), dtype), "b": jnp.ones((1,), dtype)}
    # Optax's own schedule and weight decay rely on promotion.
    with jax.numpy_dtype_promotion("standard"):
        (after, _), curve = quick_jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=60))(params)
    assert after["w"].dtype == dtype
    leaves = jax.tree.leaves(tx.init(params))
    assert len({id(x) for x in leaves}) == len(leaves), "no array stands twice in a state, so that it can be donated"
    assert curve[-1] < 0.5 * curve[0]


def test_muon_takes_hidden_matrices_and_adamw_the_rest() -> None:
    rng = np.random.default_rng(3)
    shapes = {"embed": (7, 4), "layers": {"w": (2, 4, 4), "b": (2, 4), "gain": (4,)}, "head": (4, 7)}
    params = jax.tree.map(lambda s: jnp.asarray(rng.standard_normal(s), jnp.float32), shapes, is_leaf=_is_shape)
    labels = hidden_matrices("embed", "head")(params)
    assert labels == {"embed": "adamw", "layers": {"w": "muon", "b": "muon", "gain": "adamw"}, "head": "adamw"}
    params["layers"]["b"] = params["layers"]["gain"]
    tx = muon_adamw(0.1)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = quick_jit(tx.update)(params, tx.init(params), params)
        adam = optax.adamw(0.1, weight_decay=0.0)
        expected, _ = adam.update(params["embed"], adam.init(params["embed"]), params["embed"])
    np.testing.assert_allclose(updates["embed"], np.asarray(expected), rtol=1e-5)
    for layer in np.asarray(updates["layers"]["w"]):  # orthogonalized: singular values of one size
        values = np.linalg.svd(layer / 0.1, compute_uv=False)
        assert values.min() > 0.5 and values.max() < 1.5
    with pytest.raises(ValueError, match="'tokens' is no entry of the parameters that train"):
        muon_adamw(0.1, others=("tokens",)).init(params)
    with pytest.raises(TypeError, match=r"others is the string 'head': pass a tuple of names, \('head',\)"):
        muon_adamw(0.1, others="head")  # type: ignore[arg-type]


def test_embeddings_and_heads_are_told_by_their_names() -> None:
    shapes = {
        "TokenEmbed_0": {"embedding": (9, 4)},
        "blocks": [{"heads_out": (4, 4), "w": (2, 4, 4), "gain": (4,), "row": (4, 1)}],
        "lm_head": {"kernel": (4, 9)},
        "wte": (9, 4),
    }
    params = jax.tree.map(jnp.ones, shapes, is_leaf=lambda x: isinstance(x, tuple))
    assert hidden_matrices_by_name(params) == {
        "TokenEmbed_0": {"embedding": "adamw"},
        "blocks": [{"heads_out": "muon", "w": "muon", "gain": "adamw", "row": "adamw"}],
        "lm_head": {"kernel": "adamw"},
        "wte": "adamw",
    }
    state = muon_adamw(0.1).init(params)
    assert jax.tree.leaves(state)


def _is_shape(x: Any) -> bool:
    return isinstance(x, tuple)


def test_errors_name_the_mend() -> None:
    with pytest.raises(ValueError, match="every must be positive and finite, got 0"):
        scale_by_soap(every=0)
    with pytest.raises(ValueError, match=r"eps must be positive and finite, got 0\.0"):
        scale_by_shampoo(eps=0.0)
    with pytest.raises(ValueError, match=r"b2 must be in \[0, 1\), got 1"):
        shampoo(0.1, b2=1)
