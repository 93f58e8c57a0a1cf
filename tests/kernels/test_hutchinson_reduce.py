"""One table of cases over every implementation of hutchinson_reduce, against float64 NumPy."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from curvax.kernels import Implementation, Unsupported
from curvax.kernels.hutchinson_reduce import OPS, hutchinson_reduce
from curvax.tree import accumulation_dtype
from tests.oracle.compiling import array, quick_jit

IMPLEMENTATIONS: tuple[Implementation, ...] = ("reference",)

CASES: dict[str, tuple[list[tuple[int, ...]], Any]] = {
    "scalar": ([()], None),
    "odd": ([(13,), (7, 3), (1,), (1, 5)], None),
    "rows": ([(13,), (7, 3), (1, 5), (400, 300)], ((), (1,), (-1,), (1,))),
    "columns": ([(7, 3), (400, 300)], ((0,), (0,))),
    "kernels": ([(3, 3, 4, 5), (5,)], ((0, 1), ())),
    "all": ([(6, 5, 4)], ((0, 1, 2),)),
    "apart": ([(6, 5, 4)], ((2, 0),)),
    "zero_size": ([(0, 4), (5,)], ((), (0,))),
    "no_leaves": ([], ()),
}


def make(shapes: list[tuple[int, ...]], probes: int, dtype: Any, seed: int) -> list[jax.Array]:
    rng = np.random.default_rng(seed)
    return [array(rng.normal(size=(probes, *s)), dtype) for s in shapes]


def by_hand(z: jax.Array, c: jax.Array, axes: tuple[int, ...], *, use_abs: bool) -> np.ndarray:
    found = np.mean(np.asarray(z, np.float64) * np.asarray(c, np.float64), axis=0)
    found = np.abs(found) if use_abs else found
    return found.mean(axis=axes, keepdims=True) if axes else found


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
class TestValues:
    @pytest.mark.parametrize("use_abs", [False, True])
    @pytest.mark.parametrize("probes", [1, 5])
    @pytest.mark.parametrize("case", CASES)
    def test_float32(self, case: str, probes: int, use_abs: bool, implementation: Implementation) -> None:
        shapes, axes = CASES[case]
        z, c = (make(shapes, probes, jnp.float32, seed) for seed in (0, 1))
        reduce = partial(hutchinson_reduce, axes=axes, use_abs=use_abs, implementation=implementation)
        got = quick_jit(reduce)(z, c)
        for i, leaf in enumerate(got):
            exact = by_hand(z[i], c[i], () if axes is None else axes[i], use_abs=use_abs)
            assert leaf.shape == exact.shape
            np.testing.assert_allclose(leaf, exact, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
    def test_other_dtypes(self, dtype: str, implementation: Implementation, x64: None) -> None:
        shapes, axes = CASES["rows"]
        z, c = (make(shapes, 3, jnp.dtype(dtype), seed) for seed in (0, 1))
        got = hutchinson_reduce(z, c, axes, implementation=implementation)
        for i, leaf in enumerate(got):
            assert leaf.dtype == accumulation_dtype(jnp.dtype(dtype))
            tolerance = 1e-13 if dtype == "float64" else 1e-5
            np.testing.assert_allclose(
                leaf, by_hand(z[i], c[i], axes[i], use_abs=False), rtol=tolerance, atol=tolerance
            )

    @pytest.mark.fast
    def test_signs_recover_a_diagonal_matrix(self, implementation: Implementation) -> None:
        diagonal = jnp.linspace(-2.0, 3.0, 700)
        z = jax.random.rademacher(jax.random.key(0), (4, 700), jnp.float32)
        got = hutchinson_reduce([z], [z * diagonal], implementation=implementation)
        np.testing.assert_allclose(got[0], diagonal, rtol=1e-6)

    def test_vmap_and_shard_map(self, implementation: Implementation) -> None:
        shapes, axes = CASES["rows"]
        z, c = (make([(3, *s) for s in shapes], 2, jnp.float32, seed) for seed in (0, 1))
        reduce = partial(hutchinson_reduce, axes=axes, implementation=implementation)
        got = quick_jit(jax.vmap(reduce, in_axes=1))(z, c)
        for member in range(3):
            want = reduce([leaf[:, member] for leaf in z], [leaf[:, member] for leaf in c])
            for g, w in zip(got, want, strict=True):
                np.testing.assert_allclose(g[member], w, rtol=1e-5, atol=1e-5)
        z, c = ([leaf[:, 0] for leaf in tree] for tree in (z, c))
        mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
        with jax.set_mesh(mesh):
            sharded = jax.jit(jax.shard_map(reduce, in_specs=P(None, "i"), out_specs=P("i")))(z, c)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), sharded, reduce(z, c))

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_what_is_not_finite_stays_in_its_block(self, bad: float, implementation: Implementation) -> None:
        z, c = ([jnp.ones((2, 4, 5))], [jnp.ones((2, 4, 5)).at[1, 2, 3].set(bad)])
        (got,) = hutchinson_reduce(z, c, ((1,),), implementation=implementation)
        assert np.flatnonzero(~np.isfinite(got)).tolist() == [2]


def test_errors() -> None:
    z = [jnp.ones((2, 3)), jnp.ones((2, 4, 5))]
    with pytest.raises(TypeError, match="products have structure"):
        hutchinson_reduce(z, z[:1])
    with pytest.raises(TypeError, match=r"leaf 1 of probes has shape \(2, 4, 5\), of products \(2, 5, 4\)"):
        hutchinson_reduce(z, [z[0], jnp.ones((2, 5, 4))])
    with pytest.raises(TypeError, match="an axis of probes in front"):
        hutchinson_reduce([jnp.ones(())], [jnp.ones(())])
    uneven = [z[0], jnp.ones((3, 4))]
    with pytest.raises(ValueError, match=r"leaves have \[2, 3\] probes"):
        hutchinson_reduce(uneven, uneven)
    with pytest.raises(ValueError, match=r"axes are \(\(\),\) for 2 leaves"):
        hutchinson_reduce(z, z, ((),))
    with pytest.raises(ValueError, match="give a tuple of axes for each"):
        hutchinson_reduce(z, z, (0, 1))  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="leaf 1 of products is int32: pass real floating-point numbers"):
        hutchinson_reduce(z, [z[0], z[1].astype(jnp.int32)])
    for axes in ((2,), (-3,), (0, 0), (1, -1)):
        with pytest.raises(ValueError, match="are not distinct axes among its 2"):
            hutchinson_reduce(z, z, ((), axes))
    with pytest.raises(Unsupported, match="hutchinson_reduce has no native implementation"):
        hutchinson_reduce(z, z, implementation="native")
    assert [op.name for op in OPS] == ["hutchinson_reduce"]
