"""The Mosaic kernels of softmax_hvp and linear_softmax_hvp compile for an H200, through ptxas, in little memory."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import curvax
from curvax.kernels import strict_backend
from curvax.kernels.linear_softmax_hvp import linear_softmax_hvp
from curvax.kernels.linear_softmax_hvp.blocks import BYTES_PER_LOGIT
from curvax.kernels.sampled_softmax_residual import sampled_softmax_residual
from curvax.kernels.softmax_hvp import softmax_hvp
from tests.lowering.h200 import busiest_loop, compile_for_h200, custom_calls, kernel_counts, temp_bytes


def _array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _launch(compiled: jax.stages.Compiled) -> str:
    (target,) = (name for name in custom_calls(compiled) if "mosaic" in name)
    return target


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 4096])
@pytest.mark.parametrize("columns", [128, 1000, 32_768, 50_257, 131_072, 262_144])
def test_one_launch_and_no_probabilities(rows: int, columns: int, dtype: Any) -> None:
    logits = _array(rows, columns, dtype=dtype)
    compiled = compile_for_h200(
        lambda z, v, w: softmax_hvp(z, v, w, implementation="pallas"), logits, logits, _array(rows)
    )
    counts = kernel_counts(compiled)
    assert dict(counts["ENTRY"]) == {f"custom-call:{_launch(compiled)}": 1}
    # What the blocks of a cluster exchange: 128 bytes each.
    assert temp_bytes(compiled) <= 8 * 128 * rows + 1024


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("columns", [128, 32_768, 50_257, 262_144])
def test_sampled_residual(columns: int, dtype: Any) -> None:
    rows = 128
    compiled = compile_for_h200(
        lambda z, u: sampled_softmax_residual(z, u, implementation="pallas"),
        _array(rows, columns, dtype=dtype),
        _array(rows),
    )
    assert custom_calls(compiled)[_launch(compiled)] == 1
    assert temp_bytes(compiled) <= 8 * 128 * rows + 2048


@pytest.mark.parametrize("columns", [1000, 32_768, 50_257])
@pytest.mark.parametrize("tangents", [2, 4, 7])
def test_several_tangents(columns: int, tangents: int) -> None:
    compiled = compile_for_h200(
        lambda z, v: softmax_hvp(z, v, implementation="pallas"), _array(16, columns), _array(tangents, 16, columns)
    )
    assert custom_calls(compiled)[_launch(compiled)] == 1


def test_vmap_over_tangents_is_one_launch() -> None:
    def products(z: jax.Array, v: jax.Array) -> jax.Array:
        return jax.vmap(lambda each: softmax_hvp(z, each, implementation="pallas"))(v)

    compiled = compile_for_h200(products, _array(16, 1024), _array(3, 16, 1024))
    assert custom_calls(compiled)[_launch(compiled)] == 1
    assert kernel_counts(compiled)["ENTRY"]["copy"] == 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("columns", [32_768, 50_257])
def test_linear_head(columns: int, dtype: Any) -> None:
    rows, features, max_bytes = 4096, 256, 2**26
    hidden, head = _array(rows, features, dtype=dtype), _array(features, columns, dtype=dtype)

    def product(h: Any, w: Any, dh: Any, dw: Any) -> Any:
        return linear_softmax_hvp(h, w, dh, dw, max_bytes=max_bytes, implementation="pallas")

    compiled = compile_for_h200(product, hidden, head, hidden, head)
    block = busiest_loop(compiled)
    assert block[f"custom-call:{_launch(compiled)}"] == 1
    # Beside a block: the head's cotangent once more, operands laid out for the matmuls, cuBLAS' workspace.
    spare = 4 * 4 * features * columns + 2**26
    assert temp_bytes(compiled) <= max_bytes + spare
    assert temp_bytes(compiled) < rows * columns * BYTES_PER_LOGIT / 4


def test_a_method_multiplies_by_the_kernel() -> None:
    """`backend="pallas"` reaches the loss: the kernel stands in the iteration of conjugate gradients."""

    def predict(params: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ params["a"]) @ params["b"]

    params = {"a": _array(32, 64), "b": _array(64, 1000)}
    batch = {"x": _array(16, 32), "y": _array(16, dtype=jnp.int32)}
    with pytest.warns(UserWarning, match="dots has no pallas implementation|cg_.* has no pallas implementation"):
        method = curvax.sgn_ce(predict_fn=predict, lam0=1e-2, learning_rate=0.1, backend="pallas")
        state = jax.eval_shape(method.init, params)
        compiled = compile_for_h200(lambda p, b, s: method.step(p, b, s)[0], params, batch, state)
    assert busiest_loop(compiled)[f"custom-call:{_launch(compiled)}"] == 1


def test_auto_keeps_the_reference() -> None:
    """Nobody has timed the kernels on a GPU: they run when asked for by name."""
    with strict_backend():
        compiled = compile_for_h200(softmax_hvp, _array(4, 1000), _array(4, 1000))
    assert not any("mosaic" in name for name in custom_calls(compiled))
