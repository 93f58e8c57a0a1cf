"""Which matrices SOAP, Shampoo and Muon see in a leaf, by rule and by label, and what is kept of them."""

from __future__ import annotations

import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from curvax.optimizers import (
    ByFunction,
    ByPath,
    Convolutions,
    LastTwoAxes,
    MatrixAxes,
    MatrixViews,
    MergedAxes,
    NoMatrices,
    Sides,
    axes_of_model,
    hidden_matrices,
    hidden_matrices_by_name,
    muon_adamw,
    scale_by_shampoo,
    scale_by_soap,
    state_bytes,
)
from tests.oracle.compiling import quick_jit
from tests.oracle.optimizers import updates as run

HEADS = ByPath({"^q$": MatrixAxes((0,), (1, 2)), "^out$": MatrixAxes((-3, -2), (-1,)), "^bias": None})
RULES: dict[str, tuple[Any, tuple[int, ...], tuple[tuple[int, ...], ...]]] = {
    "stack": (LastTwoAxes(), (2, 3, 4, 5), ((2, 3, 4, 5),)),
    "vector": (LastTwoAxes(), (5,), ((5,),)),
    "kernel": (Convolutions(), (3, 2, 4, 5), ((24, 5),)),
    "kernel in one dimension": (Convolutions(), (3, 4, 5), ((3, 4, 5),)),
    "depthwise kernel": (Convolutions(), (3, 3, 1, 8), ((3, 3, 1, 8),)),
    "stacked heads": (Convolutions(), (12, 8, 4, 2), ((12, 8, 4, 2),)),
    "merged": (MergedAxes(18), (3, 3, 2, 5), ((18, 5),)),
    "merged in part": (MergedAxes(9), (3, 3, 1, 4, 5), ((9, 4, 5),)),
    "merged altogether": (MergedAxes(64), (4, 1, 16), ((4, 1, 16),)),
    "q": (HEADS, (6, 2, 3), ((6, 6),)),
    "out": (HEADS, (2, 3, 6), ((6, 6),)),
    "bias": (HEADS, (2, 3), ((2, 3),)),
    "per head": (ByFunction(lambda path, shape: MatrixAxes((0,), (2,))), (6, 2, 3), ((2, 6, 3),)),
    "blocks": (ByFunction(lambda path, shape: MatrixAxes((1,), (0,))), (5, 3), ((1, 3, 4), (1, 3, 1))),
    "parts": (ByPath({"parts": MatrixAxes((0,), (1,), column_parts=(4, 2, 2))}), (3, 8), ((1, 3, 4), (2, 3, 2))),
    "empty": (LastTwoAxes(), (0, 5), ((0, 5),)),
}


@pytest.mark.parametrize("name", RULES)
def test_a_rule_says_what_is_a_matrix_and_nothing_is_lost(name: str) -> None:
    rule, shape, stacks = RULES[name]
    leaf = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    views = MatrixViews.of({name: leaf}, rule, 4 if name == "blocks" else None)
    found = views.split([jnp.asarray(leaf)])
    assert tuple(x.shape for x in found) == stacks
    np.testing.assert_array_equal(views.join(found)[0], leaf)
    assert views.describe().startswith(f"{name} {shape}: ")


def test_rows_and_columns_are_where_they_were_said_to_be() -> None:
    leaf = np.random.default_rng(0).standard_normal((6, 2, 3)).astype(np.float32)
    per_head = MatrixViews.of({"q": leaf}, ByFunction(lambda path, shape: MatrixAxes((2,), (0,))))
    np.testing.assert_array_equal(per_head.split([jnp.asarray(leaf)])[0], leaf.transpose(1, 2, 0))


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (MatrixAxes((0,), (0,)), "name each axis once"),
        (MatrixAxes((0,), (3,)), r"w \(4, 3\) has no rows \(0,\) and columns \(3,\)"),
        (MatrixAxes((0,), (1,), shape=(4, 4)), "has no rows"),
        (MatrixAxes((0,), (1,), column_parts=(2, 2)), r"a side of 3, and its parts \(2, 2\) do not add up"),
    ],
    ids=["twice", "beyond", "reshaped", "parts"],
)
def test_axes_that_do_not_fit(axes: MatrixAxes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scale_by_soap(matrices=ByFunction(lambda path, shape: axes)).init({"w": jnp.ones((4, 3))})


def model(p: Any, x: jax.Array) -> jax.Array:
    """Convolutions, a scan of dense layers, and heads; (B, 4, 4, 2) -> (B, 4)."""
    for name, groups in (("kernel", 1), ("depthwise", 6)):
        layout = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(
            x, p[name], (1, 1), "SAME", dimension_numbers=layout, feature_group_count=groups
        )
    x, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x.mean((1, 2)) + p["bias"], p["layers"])
    return jnp.einsum("bhe,hed->bd", jnp.einsum("bd,dhe->bhe", x, p["q"]), p["out"])


SHAPES = {
    "kernel": (3, 3, 2, 6),
    "depthwise": (3, 3, 1, 6),
    "bias": (6,),
    "layers": (2, 6, 6),
    "q": (6, 2, 4),
    "out": (2, 4, 4),
}


def normal(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.standard_normal(shape)) for name, shape in shapes.items()}


def test_a_model_says_what_its_matrices_are() -> None:
    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()}
    inputs = jax.ShapeDtypeStruct((5, 4, 4, 2), jnp.float32)

    def stacks(**options: bool) -> dict[str, tuple[tuple[int, ...], ...]]:
        views = MatrixViews.of(shapes, axes_of_model(model, shapes, inputs, **options)).views
        return {view.path: view.stacks for view in views if view.axes is not None}

    assert stacks() == {"kernel": ((18, 6),), "layers": ((2, 6, 6),), "q": ((6, 8),), "out": ((8, 4),)}
    assert stacks(heads_apart=True) == stacks() | {"q": ((2, 6, 4),), "out": ((2, 4, 4),)}


@pytest.mark.parametrize(
    "make",
    [
        lambda rule: scale_by_soap(every=2, matrices=rule),
        lambda rule: scale_by_shampoo(every=2, matrices=rule, sides=Sides.SHORTER),
        lambda rule: muon_adamw(1.0, others=(), matrices=rule),
    ],
    ids=["soap", "shampoo", "muon"],
)
@jax.numpy_dtype_promotion("standard")  # Optax's weight decay relies on promotion
def test_leaves_step_as_the_matrices_that_they_are(make: Any, x64: None) -> None:
    """Those of a model as written with convolutions, heads and a scan, and as plain matrices and vectors."""
    params = normal(SHAPES)
    rule = axes_of_model(model, params, jnp.zeros((5, 4, 4, 2)))
    plain = {"kernel": (18, 6), "depthwise": (54,), "bias": (6,), "q": (6, 8), "out": (8, 4)}
    grads = [normal(SHAPES, seed) for seed in range(1, 4)]

    def unrolled(g: dict[str, jax.Array]) -> dict[str, Any]:
        return {name: g[name].reshape(shape) for name, shape in plain.items()} | {"layers": list(g["layers"])}

    found = run(make(rule), grads)
    for update, expected in zip(found, run(make(LastTwoAxes()), list(map(unrolled, grads))), strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), unrolled(update), expected)


def test_labels_by_path_expression_and_function() -> None:
    shapes = {"params": {"embed": {"table": (5, 4)}, "body": {"w": (4, 4), "gate": (4, 4)}, "lm_head": (4, 5)}}
    params = jax.tree.map(jnp.ones, shapes, is_leaf=lambda x: isinstance(x, tuple))

    def muon(*others: Any, **options: Any) -> set[str]:
        labels = hidden_matrices(*others, **options)(params)
        return {jax.tree_util.keystr(p[-1:], simple=True) for p, x in jax.tree.leaves_with_path(labels) if x == "muon"}

    assert muon("params/embed", "params/lm_head") == {"w", "gate"}
    assert muon(re.compile("embed|head$"), "params/body/gate") == {"w"}
    assert muon(lambda path, shape: 5 in shape) == {"w", "gate"}
    assert muon(matrices=ByPath({"gate": None})) == {"table", "w", "lm_head"}
    with pytest.raises(ValueError, match=r"'embed' is no entry .* which are params: .* or 'params/embed', as"):
        muon("embed")
    norms = {"layers": {"norm": {"scale": jnp.ones((3, 4)), "bias": jnp.ones((3, 4))}, "w": jnp.ones((3, 4, 4))}}
    assert hidden_matrices_by_name(norms)["layers"] == {"norm": {"scale": "adamw", "bias": "adamw"}, "w": "muon"}


@jax.numpy_dtype_promotion("standard")
def test_trees_of_equinox_keep_what_does_not_train() -> None:
    network = eqx.nn.MLP(3, 2, 4, 2, key=jax.random.key(0))
    params = eqx.filter(network, eqx.is_inexact_array)
    tx = muon_adamw(0.1, others=("layers/2",))
    updates, state = quick_jit(tx.update)(params, tx.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert jax.tree.leaves(state)
    values = np.linalg.svd(np.asarray(updates.layers[1].weight) / 0.1, compute_uv=False)
    assert values.min() > 0.5


def test_bytes_are_said_before_anything_is_made() -> None:
    params: Any = {"w": jax.ShapeDtypeStruct((3, 6, 4), jnp.bfloat16), "b": jax.ShapeDtypeStruct((6,), jnp.float32)}
    for tx, by_leaf, shared in (
        (scale_by_soap(), {"b": 2 * 6, "w": 3 * (2 * 24 + 2 * (36 + 16))}, 2),
        (scale_by_soap(sides=Sides.SHORTER), {"b": 2 * 6, "w": 3 * (2 * 24 + 2 * 16)}, 2),
        (scale_by_shampoo(block_dim=3), {"b": 2 * 36, "w": 3 * 2 * (4 * 9 + 2 * 9 + 2 * 1)}, 2),
        (optax.scale_by_adam(mu_dtype=jnp.float32), {"b": 12, "w": 3 * 36}, 1),
    ):
        found = state_bytes(tx, params)
        assert dict(found.by_leaf) == {name: 4 * count for name, count in by_leaf.items()}
        assert found.shared == 4 * shared
        made = jax.tree.leaves(tx.init(params))
        assert found.total == sum(x.nbytes for x in made)
    assert found.explain().splitlines()[-1] == f"state of the optimizer: {found.total:,} bytes"
    labeled = state_bytes(muon_adamw(0.1, others=("b",), matrices=NoMatrices()), params)
    assert dict(labeled.by_leaf) == {"b": 2 * 4 * 6, "w": 2 * 4 * 72}
