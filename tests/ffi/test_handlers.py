"""The native handlers called directly: they refuse what does not fit with a sentence, and take every legal edge."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax import ffi

pytestmark = pytest.mark.fast

F32 = jnp.float32
SCALAR = jax.ShapeDtypeStruct((), F32)


def leaf(*shape: int, dtype: Any = F32) -> jax.Array:
    return jnp.ones(shape, dtype)


def result(*shape: int, dtype: Any = F32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def call(target: str, results: list[jax.ShapeDtypeStruct], *operands: jax.Array, threads: int = 0) -> list[np.ndarray]:
    return [np.asarray(r) for r in jax.ffi.ffi_call(target, results)(*operands, threads=np.int64(threads))]


@pytest.fixture(autouse=True)
def registered() -> None:
    status = ffi.native_status()
    if not status.available:
        pytest.skip(status.reason)


V = leaf(3)
REFUSED: dict[str, tuple[str, list[Any], list[Any], str]] = {
    "update_operand_count": (
        "curvax_cg_update",
        [SCALAR, result(3), result(3)],
        [F32(1), F32(0), V, V, V],
        r"curvax cg_update: got 5 operands, expected alpha, lam and the leaves of x, p, r and q",
    ),
    "update_no_operands": ("curvax_cg_update", [SCALAR], [], r"cg_update: got 0 operands"),
    "update_result_count": (
        "curvax_cg_update",
        [SCALAR, result(3)],
        [F32(1), F32(0), V, V, V, V],
        r"cg_update: got 2 results for 1 leaves, expected rr and the leaves of x and r: 3",
    ),
    "update_operand_shape": (
        "curvax_cg_update",
        [SCALAR, result(3), result(3)],
        [F32(1), F32(0), V, V, V, leaf(4)],
        r"cg_update: operand 5 has shape \(4\), expected \(3\)",
    ),
    "update_same_size_other_shape": (
        "curvax_cg_update",
        [SCALAR, result(2, 3), result(2, 3)],
        [F32(1), F32(0), leaf(2, 3), leaf(3, 2), leaf(2, 3), leaf(2, 3)],
        r"cg_update: operand 3 has shape \(3, 2\), expected \(2, 3\)",
    ),
    "update_result_shape": (
        "curvax_cg_update",
        [SCALAR, result(3), result(4)],
        [F32(1), F32(0), V, V, V, V],
        r"cg_update: result 2 has shape \(4\), expected \(3\)",
    ),
    "update_damping_dtype": (
        "curvax_cg_update",
        [SCALAR, result(3), result(3)],
        [F32(1), jnp.float16(0), V, V, V, V],
        r"cg_update: operand 1 has dtype F16, expected F32",
    ),
    "update_unsupported_dtype": (
        "curvax_cg_update",
        [result(dtype=jnp.bfloat16), result(3, dtype=jnp.bfloat16), result(3, dtype=jnp.bfloat16)],
        [jnp.bfloat16(1), jnp.bfloat16(0), *[leaf(3, dtype=jnp.bfloat16)] * 4],
        r"cg_update: dtype BF16 is not supported; use F32 or F64",
    ),
    "update_mixed_dtype": (
        "curvax_cg_update",
        [SCALAR, result(3), result(3)],
        [F32(1), F32(0), V, leaf(3, dtype=jnp.float16), V, V],
        r"cg_update: operand 3 has dtype F16, expected F32",
    ),
    "update_batch_axes": (
        "curvax_cg_update",
        [result(2), result(3), result(3)],
        [leaf(2), leaf(2), V, V, V, V],
        r"cg_update: leaf 0 of shape \(3\) does not begin with the batch axes \(2\) of the scalar",
    ),
    "direction_operand_count": ("curvax_cg_direction", [result(3)], [F32(1), V], r"cg_direction: got 2 operands"),
    "direction_result_count": ("curvax_cg_direction", [result(3)] * 2, [F32(1), V, V], r"cg_direction: got 2 results"),
    "direction_result_dtype": (
        "curvax_cg_direction",
        [result(3, dtype=jnp.int32)],
        [F32(1), V, V],
        r"cg_direction: result 0 has dtype S32, expected F32",
    ),
    "dots_operand_count": ("curvax_dots", [SCALAR], [V], r"dots: got 1 operands for 1 results"),
    "dots_operand_shape": ("curvax_dots", [SCALAR], [V, leaf(5)], r"dots: operand 1 has shape \(5\), expected \(3\)"),
    "dots_result_dtype": (
        "curvax_dots",
        [result(dtype=jnp.int32)],
        [V, V],
        r"dots: dtype S32 is not supported; use F32 or F64",
    ),
    "dots_result_shape": (
        "curvax_dots",
        [SCALAR, result(1)],
        [V] * 4,
        r"dots: result 1 has shape \(1\), expected \(\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_a_sentence(case: str) -> None:
    target, results, operands, message = REFUSED[case]
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        call(target, results, *operands)


def test_the_process_is_well_after_a_refusal() -> None:
    with pytest.raises(jax.errors.JaxRuntimeError):
        call("curvax_dots", [SCALAR], V)
    assert call("curvax_dots", [SCALAR], V, V)[0] == 3


def test_a_missing_attribute_is_refused() -> None:
    with pytest.raises(jax.errors.JaxRuntimeError, match="number of attributes"):
        jax.block_until_ready(jax.ffi.ffi_call("curvax_dots", [SCALAR])(V, V))


def test_no_leaves_and_no_elements() -> None:
    assert call("curvax_cg_update", [SCALAR], F32(2), F32(0))[0] == 0
    rr, x, r = call("curvax_cg_update", [SCALAR, result(0), result(0)], F32(2), F32(0), *[leaf(0)] * 4)
    assert (rr, x.shape, r.shape) == (0, (0,), (0,))
    assert call("curvax_dots", [SCALAR, SCALAR]) == [0, 0]
    empty_batch = call("curvax_cg_direction", [result(0, 3)], leaf(0), leaf(0, 3), leaf(0, 3))
    assert empty_batch[0].shape == (0, 3)


@pytest.mark.parametrize("threads", [-1, 0, 1, 1000])
def test_any_number_of_threads(threads: int) -> None:
    v = jnp.arange(100_000, dtype=F32) / 100_000
    expected = float(np.sum(np.asarray(v, np.float64) ** 2))
    np.testing.assert_allclose(call("curvax_dots", [SCALAR], v, v, threads=threads)[0], expected, rtol=1e-6)


def test_long_sums_stay_accurate() -> None:
    """A running float32 sum of 2^25 ones would stop at 2^24."""
    v = jnp.ones(2**25, F32)
    assert call("curvax_dots", [SCALAR], v, v)[0] == 2**25
