"""The Gram matrix of row factors against explicit Jacobians, whatever the memory bound and the model."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax.curvature import Evaluation, GaussNewton, Model, MonteCarloFisher, Needs, ObservedFisher
from curvax.losses import SquaredError
from curvax.structure import jacobian_gram
from tests.oracle import dense
from tests.oracle.compiling import array, quick_jit
from tests.oracle.models import ALL, MIXING, MLP_TANH


def _rows(predict: Any, params: Any, batch: Any, metric: Any = None, key: Any = None) -> Any:
    operator = GaussNewton(Model(predict), SquaredError(reduction="sum")) if metric is None else GaussNewton(
        Model(predict), SquaredError(reduction="sum"), metric
    )  # fmt: skip
    return operator.linearize(params, Evaluation(batch, sample_key=key), Needs(rows=True)).rows


@pytest.mark.filterwarnings("ignore:the model's examples interact")
@pytest.mark.parametrize("model", ALL, ids=str)
def test_squared_error_gram_is_the_jacobians(model: Any) -> None:
    with jax.enable_x64(True):
        params, batch = model.params(jnp.float64), {"x": model.inputs(jnp.float64), "y": model.targets(jnp.float64)}
        gram = np.asarray(quick_jit(lambda p, b: _rows(model.predict, p, b).gram(1 << 30))(params, batch))
        _, jacobian = dense.outputs_and_jacobian(model.predict, params, batch["x"])
        np.testing.assert_allclose(gram, jacobian @ jacobian.T, rtol=1e-10, atol=1e-10 * np.abs(gram).max())


def test_a_model_that_mixes_examples_is_warned_of() -> None:
    model = MIXING[0]
    params, batch = model.params(jnp.float32), {"x": model.inputs(jnp.float32), "y": model.targets(jnp.float32)}
    with pytest.warns(UserWarning, match="examples interact .*over the batch: make predict_fn act on each example"):
        jax.eval_shape(lambda p: _rows(model.predict, p, batch).gram(1 << 30), params)


def test_the_memory_bound_changes_nothing_but_memory() -> None:
    model = MLP_TANH
    params, batch = model.params(jnp.float32), {"x": model.inputs(jnp.float32), "y": model.targets(jnp.float32)}

    @quick_jit
    def grams(params: Any) -> list[jax.Array]:
        rows = _rows(model.predict, params, batch)
        return [rows.gram(bound) for bound in (1 << 30, 1, 2_000, 10_000)]

    whole, *bounded = (np.asarray(gram) for gram in grams(params))
    for gram in bounded:
        np.testing.assert_allclose(gram, whole, rtol=1e-5, atol=1e-5 * np.abs(whole).max())


def test_the_memory_bound_holds_for_rows_that_are_formed() -> None:
    def predict(params: Any, x: jax.Array) -> jax.Array:
        y = jax.lax.conv_general_dilated(x, params["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jnp.tanh(y).mean((1, 2)) @ params["v"]

    # 64 formed rows of 9 * 64 * 256 weights are 36 MiB, the patches and cotangents that they come from 9 MiB.
    rng = np.random.default_rng(0)
    w, v, x = (array(rng.standard_normal(s), jnp.float32) for s in ((3, 3, 64, 256), (256, 2), (32, 8, 8, 64)))
    params = {"w": w, "v": v}

    def gram(max_bytes: int) -> tuple[np.ndarray, int]:
        compiled = jax.jit(lambda p, x: jacobian_gram(predict, p, x, max_bytes=max_bytes)).lower(params, x).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        return np.asarray(compiled(params, x)), memory.temp_size_in_bytes

    (whole, unbounded), (bounded, temporary) = gram(1 << 30), gram(12 << 20)
    assert temporary < 12 << 20 < unbounded
    np.testing.assert_allclose(bounded, whole, rtol=1e-4, atol=1e-5 * np.abs(whole).max())


def _convolution(params: Any, x: jax.Array) -> jax.Array:
    y = jax.lax.conv_general_dilated(x, params["w"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jnp.tanh(y).reshape(len(x), -1) @ params["v"]


def _attention(params: Any, x: jax.Array) -> jax.Array:
    h = x @ params["v"]
    h = h + jax.nn.softmax((h @ params["w"]) @ jnp.swapaxes(h, -1, -2)) @ h
    return h @ params["w"]


@pytest.mark.parametrize(
    ("predict", "shapes"),
    [
        (_convolution, {"w": (3, 3, 2, 16), "v": (4 * 4 * 16, 12), "x": (24, 8, 8, 2)}),
        (_attention, {"w": (9, 9), "v": (6, 9), "x": (6, 10, 6)}),
    ],
    ids=["convolution", "attention"],
)
def test_the_plan_knows_the_memory_that_rows_take(predict: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    """Planned bytes against those of the compiled program, with room for all rows, for some, and for less than one
    example's."""
    rng = np.random.default_rng(0)
    params = {k: array(rng.standard_normal(s), jnp.float32) for k, s in shapes.items()}
    x = params.pop("x")
    batch = {"x": x, "y": jnp.zeros(jax.eval_shape(predict, params, x).shape)}

    def groups(max_bytes: int) -> Any:
        found: list[Any] = []
        jax.eval_shape(lambda p: found.append(_rows(predict, p, batch).groups(max_bytes)), params)
        return found[0]

    whole = groups(1 << 40)
    everything, size = whole.groups * whole.bytes, whole.total**2 * 4
    results = []
    for bound in (everything, everything // 3, whole.bytes // 2):
        rows = groups(bound)
        planned = rows.pieces(bound).bytes
        compiled = jax.jit(lambda p, b=bound: _rows(predict, p, batch).gram(b)).lower(params).compile()
        memory = compiled.memory_analysis()
        assert memory is not None and planned <= bound
        # Beside the rows there are two Gram matrices, one of them mirrored.
        assert memory.temp_size_in_bytes <= planned + 2.5 * size
        results.append((rows.rows, np.asarray(compiled(params))))
    assert results[0][0] == whole.rows > results[2][0], "only what does not fit comes in parts of an example"
    for _, gram in results[1:]:
        np.testing.assert_allclose(gram, results[0][1], rtol=1e-4, atol=1e-5 * np.abs(gram).max())


@pytest.mark.parametrize("metric", [MonteCarloFisher(3), ObservedFisher()], ids=str)
def test_gram_and_product_are_one_operator(metric: Any) -> None:
    with jax.enable_x64(True):
        model = MLP_TANH
        params, batch = model.params(jnp.float64), {"x": model.inputs(jnp.float64), "y": model.targets(jnp.float64)}

        @quick_jit
        def both(params: Any) -> tuple[jax.Array, jax.Array]:
            rows = _rows(model.predict, params, batch, metric, jax.random.key(1))
            shape = rows.output.row_shape

            def product(e: jax.Array) -> jax.Array:
                pulled = rows.vjp(rows.output.factor(e.reshape(shape)))
                return rows.output.factor_transpose(rows.jvp(pulled)).reshape(-1)

            return rows.gram(1 << 30), jax.vmap(product)(jnp.eye(int(np.prod(shape))))

        gram, columns = (np.asarray(x) for x in both(params))
        np.testing.assert_allclose(gram, columns, rtol=1e-10, atol=1e-12 * np.abs(gram).max())
