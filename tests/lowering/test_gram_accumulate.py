"""gram_accumulate as a Triton kernel: the program around it, its machine code, its values in Triton's interpreter."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax.kernels.gram_accumulate import gram_accumulate, triton
from curvax.kernels.gram_accumulate.factors import Rows
from tests.lowering import cubins
from tests.lowering.h200 import compile_for_h200, custom_calls, kernel_counts, temp_bytes

_CALL = "triton_kernel_call_ffi"


def shapes(*dims: tuple[int, ...], dtype: str = "float32") -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(d, jnp.dtype(dtype)) for d in dims]


def by_triton(gram: jax.Array, a: jax.Array | None, d: jax.Array) -> jax.Array:
    return gram_accumulate(gram, a, d, implementation="triton")


@pytest.fixture
def jax_triton() -> None:
    pytest.importorskip("jax_triton", reason="jax-triton is not installed: pip install 'curvax[triton]'")


@pytest.mark.usefixtures("jax_triton")
class TestProgram:
    def test_one_launch_and_no_product_in_memory(self) -> None:
        compiled = compile_for_h200(by_triton, *shapes((1280, 1280), (128, 785), (128, 10, 256)))
        assert custom_calls(compiled) == {_CALL: 1}
        assert kernel_counts(compiled)["ENTRY"].total() == 1
        assert temp_bytes(compiled) == 0

    @pytest.mark.parametrize("kept", [True, False])
    def test_positions(self, kept: bool) -> None:
        """A few positions stay on chip; rows of many are formed by one product before."""
        t = 3 if kept else 30
        compiled = compile_for_h200(by_triton, *shapes((256, 256), (128, t, 256), (128, 2, t, 64)))
        assert custom_calls(compiled)[_CALL] == 1
        assert (temp_bytes(compiled) == 0) == kept

    def test_explicit_half_precision_rows(self) -> None:
        gram, rows = *shapes((640, 640)), *shapes((64, 10, 256), dtype="bfloat16")
        compiled = compile_for_h200(lambda g, d: by_triton(g, None, d), gram, rows)
        assert custom_calls(compiled) == {_CALL: 1}

    def test_vmap_is_one_launch(self) -> None:
        operands = shapes((4, 640, 640), (4, 64, 32), (4, 64, 10, 128))
        assert custom_calls(compile_for_h200(jax.vmap(by_triton), *operands)) == {_CALL: 1}


@pytest.mark.parametrize("capability", cubins.CAPABILITIES)
@pytest.mark.parametrize("positions", [1, 3])
@pytest.mark.parametrize("per_group", [1, 10])
def test_machine_code(capability: int, per_group: int, positions: int) -> None:
    """The products run on tensor cores, of the newest kind that there is, and registers hold what the loop needs."""
    pytest.importorskip("triton")
    from curvax.kernels.gram_accumulate.triton_kernel import gram_tile

    groups = 4096 // per_group
    (a, d) = shapes((groups, positions, 256), (groups, per_group, positions, 256))
    rows = Rows(a, d)  # pyright: ignore[reportArgumentType]
    shape = triton.tiling(rows, divmod(capability, 10))
    names = "gram left_activations left_cotangents right_activations right_cotangents result".split()
    found = cubins.build(
        gram_tile,
        dict.fromkeys(names, "fp32"),
        triton.constants(rows, rows, True, shape),
        capability,
        shape.warps,
        shape.stages,
    )
    print(f"sm_{capability}, {per_group} rows per group, {positions} positions, {shape}: {found}")
    # Summing over positions keeps a few addresses out of the inner loop's registers on sm_80.
    assert found.spilled <= (0 if positions == 1 else 64)
    newest = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[capability]
    # Three products for one: the three terms of the TF32 sum.
    assert found.tensor_cores[newest] % 3 == 0 and found.tensor_cores[newest] > 0
    # Two blocks fit on a multiprocessor's 228 KiB (164 on sm_80).
    assert 2 * found.shared <= (164 if capability == 80 else 228) * 1024


def test_values_in_the_interpreter() -> None:
    """Every case of `interpret_gram.CASES` within a few dozen roundings, as on a device."""
    pytest.importorskip("triton")
    script = pathlib.Path(__file__).with_name("interpret_gram.py")
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 12
    assert {str(case): error for case, error in found if not error <= 64} == {}


def test_three_terms_of_tf32_keep_their_bound() -> None:
    """x y less the three products is at most 3 x 2^-22 |x y|, as the docstring of the op says; emulated in float64."""
    x, y = np.random.default_rng(0).standard_normal((2, 1_000_000)).astype(np.float32)

    def tf32(values: np.ndarray) -> np.ndarray:
        """Rounded to 10 bits of mantissa, ties away from zero."""
        bits = np.asarray(values, np.float32).view(np.uint32)
        return ((bits + np.uint32(1 << 12)) & np.uint32(0xFFFFE000)).view(np.float32)

    (xh, yh), exact = (tf32(x), tf32(y)), x.astype(np.float64) * y
    xl, yl = tf32(x - xh), tf32(y - yh)
    kept = sum(a.astype(np.float64) * b for a, b in ((xh, yh), (xh, yl), (xl, yh)))
    worst = np.max(np.abs(kept - exact) / np.abs(exact))
    assert 0.3 * 2**-22 < worst <= 3 * 2**-22
    assert np.max(np.abs(xh.astype(np.float64) * yh - exact) / np.abs(exact)) > 2**-12
