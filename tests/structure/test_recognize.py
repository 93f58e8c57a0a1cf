"""Which parameters need no rows of the Jacobian, what is said of the others, and that either way the Gram is right."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax.curvature import Evaluation, GaussNewton, Model, Needs
from curvax.losses import Loss, SoftmaxCrossEntropy, SquaredError
from curvax.structure import report
from tests.oracle import dense
from tests.oracle.compiling import array, quick_jit
from tests.oracle.models import MIXING, MLP_RELU, MLP_TANH

FEATURES, WIDTH, CLASSES, BATCH = 3, 4, 3, 5


@dataclass(frozen=True)
class Case:
    """A model of inputs (B, 3) whose leaves have names and shapes, and the rule expected for each leaf."""

    name: str
    predict: Callable[[Any, jax.Array], jax.Array]
    shapes: dict[str, tuple[int, ...]]
    rules: dict[str, str]

    def __str__(self) -> str:
        return self.name

    def params(self, dtype: Any) -> dict[str, jax.Array]:
        rng = np.random.default_rng(0)
        return {k: array(rng.standard_normal(shape) * 0.7, dtype) for k, shape in self.shapes.items()}

    def inputs(self, dtype: Any) -> jax.Array:
        return array(np.random.default_rng(1).standard_normal((BATCH, FEATURES)), dtype)


def _vmapped(p: Any, x: jax.Array) -> jax.Array:
    return jax.vmap(lambda row: p["v"] @ jax.nn.relu(p["w"] @ row + p["b"]) + p["c"])(x)


def _residual(p: Any, x: jax.Array) -> jax.Array:
    h = x + (jnp.tanh(x @ p["w"] + p["b"]) @ p["v"] + p["c"])
    return h + (h @ p["u"]) * jnp.ones_like(h)


def _heads(p: Any, x: jax.Array) -> jax.Array:
    heads = jnp.einsum("bi,ihd->bhd", x, p["w"]) + p["b"]
    return jnp.einsum("bhd,hdo->bo", jnp.sin(heads), p["v"])


def _scanned(p: Any, x: jax.Array) -> jax.Array:
    body = jax.lax.scan(lambda h, _: (jnp.tanh(h @ p["w"]), None), x, length=3)[0]
    return body @ p["v"]


def _custom_identity() -> Callable[[jax.Array], jax.Array]:
    """The identity with twice the identity's derivative."""
    doubled = jax.custom_jvp(lambda x: x * 1.0)
    doubled.defjvp(lambda primals, tangents: (primals[0], 2.0 * tangents[0]))
    return doubled


W, V, B, C = (FEATURES, WIDTH), (WIDTH, CLASSES), (WIDTH,), (CLASSES,)
EXPLICIT = "explicit rows"
CASES = (
    Case(
        "leaf used twice",
        lambda p, x: jnp.tanh(jnp.tanh(x @ p["w"]) @ p["w"] + p["b"]) @ p["v"],
        {"w": (3, 3), "b": (3,), "v": (3, 3)},
        {"w": "dense", "b": "bias", "v": "dense"},
    ),
    Case(
        "transposed weights",
        lambda p, x: (p["v"] @ jnp.tanh(x @ p["w"].T + p["b"]).T).T + p["c"],
        {"w": (4, 3), "b": B, "v": (3, 4), "c": C},
        {"w": "dense", "b": "bias", "v": "dense", "c": "bias"},
    ),
    Case(
        "bias shared by two layers",
        lambda p, x: jnp.tanh(jnp.tanh(x @ p["w"] + p["b"]) @ p["v"] + p["b"]),
        {"w": (3, 4), "v": (4, 4), "b": B},
        {"w": "dense", "v": "dense", "b": "bias"},
    ),
    Case(
        "one matrix of biases shared without reshaping",
        lambda p, x: jnp.tanh(x[:, None, :] @ p["w"] + p["b"])[:, 0] @ p["v"] + (p["b"] * 2.0)[0, 0, :3],
        {"w": W, "v": V, "b": (1, 1, 4)},
        {"w": "dense", "v": "dense", "b": "bias"},
    ),
    Case(
        "inner jit",
        lambda p, x: jax.jit(lambda q, y: jax.jit(jnp.tanh)(y @ q["w"] + q["b"]) @ q["v"])(p, x),
        {"w": W, "b": B, "v": V},
        {"w": "dense", "b": "bias", "v": "dense"},
    ),
    Case(
        "vmapped", _vmapped, {"w": (4, 3), "b": B, "v": (3, 4), "c": C}, dict(w="dense", b="bias", v="dense", c="bias")
    ),
    Case(
        "residual connections",
        _residual,
        {"w": W, "b": B, "v": V, "c": C, "u": (3, 3)},
        {"w": "dense", "b": "bias", "v": "dense", "c": "bias", "u": "dense"},
    ),
    Case(
        "dead and empty leaves",
        lambda p, x: x @ p["w"] + jnp.sum(p["empty"]),
        {"w": (3, 3), "dead": (7,), "empty": (0, 2)},
        {"w": "dense", "dead": "no rows", "empty": "no rows"},
    ),
    Case(
        "weight used as dense and elsewhere",
        lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"] + jnp.sum(jnp.square(p["w"])),
        {"w": W, "v": V},
        {"w": EXPLICIT, "v": "dense"},
    ),
    Case(
        "two biases and a scalar",
        lambda p, x: (x @ p["w"] - p["b"][None, :] + jnp.reshape(p["c"], (1, 3))) * p["s"],
        {"w": (3, 3), "b": (3,), "c": C, "s": ()},
        {"w": "dense", "b": "bias", "c": "bias", "s": "scale"},
    ),
    Case(
        "product read twice before its bias",
        lambda p, x: (lambda h: jnp.tanh(h + p["b"]) + jnp.sin(h))(x @ p["w"]) @ p["v"],
        {"w": W, "b": B, "v": V},
        {"w": "dense", "b": "bias", "v": "dense"},
    ),
    Case(
        "einsum with heads", _heads, {"w": (3, 2, 4), "b": (2, 4), "v": (2, 4, 3)}, dict(w="dense", b="bias", v="dense")
    ),
    Case("inside a scan", _scanned, {"w": (3, 3), "v": (3, 3)}, {"w": "dense", "v": "dense"}),
    Case(
        "shared by positions",
        lambda p, x: jnp.sum(jnp.tanh(x[:, :, None] @ p["w"] + p["b"]), 1) @ p["v"],
        {"w": (1, 4), "b": B, "v": V},
        {"w": "dense", "b": "bias", "v": "dense"},
    ),
    Case(
        "product of two parameters",
        lambda p, x: x @ (p["w"] @ p["v"]),
        {"w": W, "v": V},
        {"w": "dense", "v": "dense"},
    ),
    Case(
        "derivative rule of its own",
        lambda p, x: _custom_identity()(x @ p["w"] + p["b"]) @ p["v"],
        {"w": W, "b": B, "v": V},
        {"w": "dense", "b": "bias", "v": "dense"},
    ),
    Case(
        "checkpointed layer",
        lambda p, x: jax.checkpoint(lambda w, y: jnp.tanh(y @ w))(p["w"], x) @ p["v"],
        {"w": W, "v": V},
        {"w": "dense", "v": "dense"},
    ),
    Case("vector weight", lambda p, x: (x @ p["w"] + p["b"])[:, None], {"w": (3,), "b": ()}, dict(w="dense", b="bias")),
)


def _gram(predict: Any, params: Any, batch: Any, loss: Loss, max_bytes: int = 1 << 30) -> jax.Array:
    operator = GaussNewton(Model(predict), loss)
    rows = operator.linearize(params, Evaluation(batch), Needs(rows=True)).rows
    assert rows is not None
    return rows.gram(max_bytes)


def _rules(predict: Any, params: Any, inputs: Any) -> dict[str, str]:
    return {leaf.path.strip("[]'"): leaf.rule for leaf in report(predict, params, inputs)}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_leaf_has_its_rule(case: Case) -> None:
    assert _rules(case.predict, case.params(jnp.float32), case.inputs(jnp.float32)) == case.rules


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gram_is_the_jacobians(case: Case) -> None:
    """With room for every row at once, and for one only."""
    with jax.enable_x64(True):
        params, x = case.params(jnp.float64), case.inputs(jnp.float64)
        outputs, jacobian = dense.outputs_and_jacobian(case.predict, params, x)
        batch = {"x": x, "y": jnp.zeros(outputs.shape)}
        loss = SquaredError(reduction="sum")
        both = quick_jit(lambda p, b: [_gram(case.predict, p, b, loss, max_bytes) for max_bytes in (1, 1 << 30)])
        for gram in both(params, batch):
            gram = np.asarray(gram)
            np.testing.assert_allclose(gram, jacobian @ jacobian.T, rtol=1e-10, atol=1e-12 * np.abs(gram).max())
            np.testing.assert_array_equal(gram, gram.T)


def test_mixed_precision_accumulates_wide() -> None:
    """float32 weights multiplied in bfloat16: the cast stands between leaf and product."""
    half, x = jnp.bfloat16, array(np.random.default_rng(2).standard_normal((6, 8)), jnp.float32)
    w = array(np.random.default_rng(3).standard_normal((8, 3)), jnp.float32)

    def predict(p: Any, y: jax.Array) -> jax.Array:
        return (y.astype(half) @ p["w"].astype(half) + p["b"].astype(half)).astype(jnp.float32)

    params, batch = {"w": w, "b": jnp.zeros(3)}, {"x": x, "y": jnp.zeros((6, 3))}
    assert _rules(predict, params, x) == {"w": "dense", "b": "bias"}
    gram = np.asarray(_gram(predict, params, batch, SquaredError(reduction="sum")))
    rounded = np.asarray(x.astype(half), np.float64)
    expected = np.kron(rounded @ rounded.T + 1.0, np.eye(3))
    assert gram.dtype == np.float32
    np.testing.assert_allclose(gram, expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_parameters_accumulate_wide() -> None:
    x = array(np.random.default_rng(2).standard_normal((6, 8)), jnp.bfloat16)
    params, batch = {"w": jnp.ones((8, 3), jnp.bfloat16)}, {"x": x, "y": jnp.zeros((6, 3), jnp.bfloat16)}
    gram = np.asarray(_gram(lambda p, y: y @ p["w"], params, batch, SquaredError(reduction="sum")))
    wide = np.asarray(x, np.float64)
    assert gram.dtype == np.float32
    np.testing.assert_allclose(gram, np.kron(wide @ wide.T, np.eye(3)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model", [MLP_TANH, MLP_RELU], ids=str)
def test_an_mlp_needs_no_rows(model: Any) -> None:
    leaves = report(model.predict, model.params(jnp.float32), model.inputs(jnp.float32))
    assert {leaf.path.rsplit("'")[-2]: leaf.rule for leaf in leaves} == {"w": "dense", "b": "bias"}
    assert str(leaves[0]) == "[0]['b']: bias: added to the output of a dense layer"


@pytest.mark.parametrize("model", MIXING, ids=str)
def test_models_that_mix_examples_say_so(model: Any) -> None:
    leaves = report(model.predict, model.params(jnp.float32), model.inputs(jnp.float32))
    assert {leaf.rule for leaf in leaves} == {EXPLICIT} and all(leaf.reason for leaf in leaves)


def test_report_takes_shapes() -> None:
    shapes = jax.eval_shape(lambda: {"w": jnp.ones((3, 4)), "b": jnp.ones(4)})
    inputs = jax.ShapeDtypeStruct((6, 3), jnp.float32)
    assert _rules(lambda p, x: x @ p["w"] + p["b"], shapes, inputs) == {"w": "dense", "b": "bias"}


def _mlp(params: Any, x: jax.Array) -> jax.Array:
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def _large(batch: int) -> tuple[list[dict[str, np.ndarray]], np.ndarray, np.ndarray]:
    rng, widths = np.random.default_rng(0), (40, 32, 24, 10)
    layers = [
        {"w": rng.standard_normal((m, n)) / m**0.5, "b": 0.1 * rng.standard_normal(n)}
        for m, n in itertools.pairwise(widths)
    ]
    return layers, rng.standard_normal((batch, widths[0])), rng.integers(0, 10, batch)


def _numpy_gram(layers: list[dict[str, np.ndarray]], x: np.ndarray) -> np.ndarray:
    """S^T J J^T S of the mean cross entropy of `_mlp` from explicit Jacobians, in float64, with the loss's own S."""
    activations, cotangents = [x], np.eye(layers[-1]["b"].size)[None].repeat(len(x), 0)
    for layer in layers[:-1]:
        activations.append(np.maximum(activations[-1] @ layer["w"] + layer["b"], 0.0))
    logits = activations[-1] @ layers[-1]["w"] + layers[-1]["b"]
    with jax.enable_x64(True):
        f, weights = jnp.asarray(logits), jnp.full(len(x), 1 / len(x))
        basis = jnp.broadcast_to(jnp.eye(f.shape[1] - 1)[:, None], (f.shape[1] - 1, len(x), f.shape[1] - 1))
        loss, nothing = SoftmaxCrossEntropy(), jnp.zeros(len(x), jnp.int32)
        columns = quick_jit(jax.vmap(lambda u: loss.factor(f, nothing, weights, u)))(basis)
        factor = np.asarray(columns).transpose(1, 2, 0)
    rows = []
    for depth in reversed(range(len(layers))):
        a = np.concatenate([activations[depth], np.ones((len(x), 1))], 1)
        rows.append(np.einsum("bi,brk->brik", a, cotangents).reshape(*cotangents.shape[:2], -1))
        if depth:
            cotangents = (cotangents @ layers[depth]["w"].T) * (activations[depth] > 0)[:, None, :]
    jacobian = np.concatenate(rows, 2)
    weighted = np.einsum("bks,bkn->bsn", factor, jacobian)
    flat = weighted.reshape(-1, jacobian.shape[2])
    return flat @ flat.T


@pytest.mark.parametrize("batch", [64, 128])
def test_large_float32_gram_under_jit(batch: int) -> None:
    """1,152 rows take the sizes at which compiled reductions have gone wrong before."""
    layers, x, labels = _large(batch)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), layers)
    data = {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(labels, jnp.int32)}
    gram = np.asarray(jax.jit(lambda p, b: _gram(_mlp, p, b, SoftmaxCrossEntropy()))(params, data))
    expected = _numpy_gram(layers, x)
    np.testing.assert_allclose(gram, expected, rtol=0, atol=3e-6 * np.abs(expected).max())


def test_the_compiled_step_holds_no_rows_of_the_jacobian() -> None:
    layers, x, labels = _large(16)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), layers)
    data = {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(labels, jnp.int32)}
    method = curvax.egn_ce(predict_fn=_mlp)
    compiled = jax.jit(method.step).lower(params, data, method.init(params)).compile()
    rows, largest = x.shape[0] * 9, _largest_buffer(compiled.as_text() or "")
    assert rows**2 <= largest < rows * min(layer["w"].size for layer in layers)


def _largest_buffer(hlo: str) -> int:
    """Entries of the largest array that occurs in a program's text."""
    shapes = re.findall(r"\b(?:f16|bf16|f32|f64)\[([0-9,]+)\]", hlo)
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)
