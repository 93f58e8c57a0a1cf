"""Leaves of the inputs that all examples share: told from those that hold examples, whatever their length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax.losses import SoftmaxCrossEntropy, SquaredError
from curvax.structure import (
    examples_independent,
    ggn_diagonal,
    jacobian_gram,
    per_example_gradient_norms,
    report,
)
from curvax.structure.batch_axis import example_axes
from tests.oracle import dense
from tests.oracle.compiling import quick_jit
from tests.oracle.token_model import drawn, token_inputs, token_params, tokens

PyTree = Any


PLACES: dict[str, Callable[[int, int], np.ndarray]] = {
    "one row": lambda b, t: np.arange(t)[None],
    "a vector": lambda b, t: np.arange(t),
    "one per example": lambda b, t: np.tile(np.arange(t), (b, 1)),
}


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize(("examples", "length"), [(4, 7), (7, 7), (7, 4), (1, 5)])
def test_rows_of_a_model_with_position_ids_are_cheap_and_right(
    examples: int, length: int, places: str, x64: None
) -> None:
    params, x = token_params(length), token_inputs(examples, length, PLACES[places](examples, length))
    labels = jnp.asarray(np.arange(examples) % 3)
    outputs, jacobian = dense.outputs_and_jacobian(tokens, params, x)
    rows = jacobian.reshape(examples, 3, -1)

    # No warning: pytest makes an error of it.
    gram = quick_jit(lambda p, i: jacobian_gram(tokens, p, i))(params, x)
    np.testing.assert_allclose(gram, np.einsum("bkn,cln->bkcl", rows, rows), rtol=1e-10, atol=1e-12)
    exact = quick_jit(lambda p, i: ggn_diagonal(tokens, SoftmaxCrossEntropy(), p, i, labels))(params, x)
    p = np.exp(outputs - outputs.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    hessian = (np.einsum("bk,kl->bkl", p, np.eye(3)) - np.einsum("bk,bl->bkl", p, p)) / examples
    np.testing.assert_allclose(
        dense.vector(exact), np.einsum("bkn,bkl,bln->n", rows, hessian, rows), rtol=1e-10, atol=1e-14
    )
    norms = quick_jit(lambda p, i: per_example_gradient_norms(tokens, SoftmaxCrossEntropy(), p, i, labels))(params, x)
    residual = (p - np.eye(3)[np.asarray(labels)]) / examples
    np.testing.assert_allclose(norms, np.linalg.norm(np.einsum("bkn,bk->bn", rows, residual), axis=1), rtol=1e-10)
    rules = {leaf.path: leaf.rule for leaf in report(tokens, params, x)}
    assert rules["['w']"] == rules["['v']"] == "dense", rules


def _operator_network(params: PyTree, x: PyTree) -> jax.Array:
    """A DeepONet: the branch on each example's sensors, the trunk on the grid that all examples share."""
    return jnp.tanh(x["sensors"] @ params["branch"]) @ jnp.tanh(x["grid"] @ params["trunk"]).T


# Per case: model, shapes of parameters, shapes of inputs, and which leaves (in order) hold the examples.
SHARED: dict[str, tuple[Callable[..., jax.Array], PyTree, PyTree, list[bool]]] = {
    "grid of another length": (
        _operator_network,
        {"branch": (3, 4), "trunk": (2, 4)},
        {"grid": (6, 2), "sensors": (5, 3)},
        [False, True],
    ),
    "grid as long as the batch": (
        _operator_network,
        {"branch": (3, 4), "trunk": (2, 4)},
        {"grid": (5, 2), "sensors": (5, 3)},
        [False, True],
    ),
    "rows against all columns": (
        lambda p, x: (x["left"] @ p["w"]) @ (x["right"] @ p["w"]).T,
        {"w": (3, 4)},
        {"left": (5, 3), "right": (5, 3)},
        [True, False],
    ),
    "a scale of features": (
        lambda p, x: jnp.tanh(x["x"] * x["a_scale"]) @ p["w"],
        {"w": (5, 2)},
        {"a_scale": (5,), "x": (5, 5)},
        [False, True],
    ),
    "a table that is looked up": (
        lambda p, x: jnp.take(x["a_table"], x["index"].astype(jnp.int32), axis=0, mode="clip") @ p["w"],
        {"w": (3, 2)},
        {"a_table": (4, 3), "index": (4,)},
        [False, True],
    ),
    "a number": (lambda p, x: x["x"] @ p["w"] * x["a"], {"w": (3, 2)}, {"a": (), "x": (4, 3)}, [False, True]),
    "an axis of length one": (
        lambda p, x: (x["x"] + x["a"]) @ p["w"],
        {"w": (3, 2)},
        {"a": (1, 3), "x": (4, 3)},
        [False, True],
    ),
    "several of one length": (
        lambda p, x: ((x["x"] @ p["w"]) * x["cos"] + x["sin"]) * x["gate"][:, None],
        {"w": (3, 4)},
        {"cos": (4,), "gate": (4,), "sin": (4,), "x": (4, 3)},
        [False, True, False, True],
    ),
    "statistics of a leaf, for all": (
        lambda p, x: (x["x"] - x["others"].mean(0)) @ p["w"],
        {"w": (3, 2)},
        {"others": (4, 3), "x": (4, 3)},
        [False, True],
    ),
}


def _filled(shapes: PyTree, seed: int) -> PyTree:
    leaves, structure = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    return jax.tree.unflatten(structure, [drawn(seed + i, *shape) for i, shape in enumerate(leaves)])


@pytest.mark.parametrize("name", SHARED)
def test_what_is_shared_is_found(name: str, x64: None) -> None:
    model, param_shapes, input_shapes, held = SHARED[name]
    params, x = _filled(param_shapes, 0), _filled(input_shapes, 10)
    axes, reason = example_axes(model, params, x)
    assert not reason and [axis is not None for axis in axes.axes] == held
    outputs, jacobian = dense.outputs_and_jacobian(model, params, x)
    gram = quick_jit(lambda p, i: jacobian_gram(model, p, i))(params, x)
    np.testing.assert_allclose(gram.reshape(outputs.size, -1), jacobian @ jacobian.T, rtol=1e-10, atol=1e-12)


def _recurrent(params: PyTree) -> Callable[..., tuple[jax.Array, jax.Array]]:
    def cell(h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = jnp.tanh(h + x @ params["w"])
        return h, h

    return cell


MIXED: dict[str, tuple[Callable[..., jax.Array], PyTree, str]] = {
    "logits of all pairs": (lambda p, x: (x @ p["w"]) @ (x @ p["w"]).T, (5, 3), "dot_general"),
    "time first": (
        lambda p, x: jax.lax.scan(_recurrent(p), jnp.zeros((x.shape[1], 4)), x)[1],
        (5, 2, 3),
        "scan",
    ),
    "attention over the first axis": (
        lambda p, x: jnp.einsum("tbd,sbd->bts", x @ p["w"], x @ p["w"]).mean(-1).T,
        (5, 2, 3),
        "dot_general",
    ),
    "running sum over the first axis": (lambda p, x: jnp.cumsum(x @ p["w"], 0), (5, 2, 3), "cumsum"),
}


@pytest.mark.parametrize("name", MIXED)
def test_what_mixes_is_named(name: str, x64: None) -> None:
    model, shape, operation = MIXED[name]
    independent, reason = examples_independent(model, {"w": drawn(0, 3, 4)}, drawn(1, *shape))
    assert not independent and operation in reason, reason


def test_inputs_without_a_leaf_as_long_as_the_outputs() -> None:
    def residual(w: jax.Array, x: PyTree) -> jax.Array:
        return jnp.concatenate([x["inner"] @ w, x["edge"] @ w])

    inputs = {"inner": jnp.ones((6, 2)), "edge": jnp.ones((3, 2))}
    independent, reason = examples_independent(residual, jnp.ones((2, 1)), inputs)
    assert not independent and "no leaf of the inputs is as long as the outputs, 9" in reason


def test_the_user_says_what_is_shared(x64: None) -> None:
    params, x = {"w": drawn(0, 3, 2)}, {"a": drawn(1, 4, 3), "b": drawn(2, 4, 3)}

    def predict(p: PyTree, i: PyTree) -> jax.Array:
        return (i["a"] * i["b"]) @ p["w"]

    def gram(axes: Any) -> jax.Array:
        return jacobian_gram(predict, params, x, batch_axes=axes)

    np.testing.assert_allclose(gram({"a": 0, "b": 0}), gram(None), rtol=1e-12)
    # What the user says of the rows is proved as what is found is.
    with pytest.warns(UserWarning, match="examples interact"):
        np.testing.assert_allclose(gram({"a": 0, "b": None}), gram(None), rtol=1e-12)


@pytest.mark.parametrize(
    ("axes", "error", "message"),
    [
        ({"a": 0}, ValueError, "prefix"),
        ({"a": 0, "b": "first"}, TypeError, r"\['b'\].*'first'.*pass an integer"),
        ({"a": 0, "b": 5}, ValueError, r"\['b'\] the axis 5.*\(4, 3\)"),
        ({"a": 1, "b": 1}, ValueError, "bring the examples to the first axis"),
    ],
)
def test_wrong_axes(axes: Any, error: type[Exception], message: str) -> None:
    x = {"a": jnp.ones((4, 3)), "b": jnp.ones((4, 3))}
    with pytest.raises(error, match=message):
        jacobian_gram(lambda w, i: (i["a"] + i["b"]) @ w, jnp.ones((3, 2)), x, batch_axes=axes)


def test_a_loss_that_couples_examples_keeps_the_fast_rows(x64: None) -> None:
    """S^T J J^T S of the centered squared error, whose S takes the mean over the batch away."""
    from curvax.curvature import Evaluation, GaussNewton, Model, Needs

    params, x = {"w": drawn(0, 3, 4), "v": drawn(1, 4, 2)}, drawn(2, 6, 3)

    def predict(p: PyTree, i: jax.Array) -> jax.Array:
        return jnp.tanh(i @ p["w"]) @ p["v"]

    operator = GaussNewton(Model(predict), SquaredError(centered=True))

    def gram(p: PyTree, y: jax.Array, bound: int) -> jax.Array:
        rows = operator.linearize(p, Evaluation({"x": x, "y": y}), Needs(rows=True)).rows
        assert rows is not None
        return rows.gram(bound)

    jaxpr = jax.make_jaxpr(lambda p, y: gram(p, y, 1 << 30))(params, drawn(3, 6, 2))
    assert "while" not in str(jaxpr)  # one pass for all rows
    _, jacobian = dense.outputs_and_jacobian(predict, params, x)
    centered = (jacobian.reshape(6, 2, -1) - jacobian.reshape(6, 2, -1).mean(0)).reshape(12, -1)
    for bound in (1 << 30, 1):
        found = quick_jit(lambda p, y, b=bound: gram(p, y, b))(params, drawn(3, 6, 2))
        np.testing.assert_allclose(found, centered @ centered.T / 6, rtol=1e-10, atol=1e-12)
