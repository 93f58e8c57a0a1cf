"""One table of cases over every implementation of the tree_cg ops, against float64 NumPy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax import ffi
from curvax.kernels import Implementation, Request, Unsupported
from curvax.kernels._dispatch import resolve
from curvax.kernels.tree_cg import OPS, cg_direction, cg_update, dots, native
from tests.oracle.compiling import array, quick_jit

IMPLEMENTATIONS: tuple[Implementation, ...] = ("reference", "native")

SHAPES: dict[str, Any] = {
    "scalar": {"a": ()},
    "one": {"a": (1,)},
    "odd": {"a": (13,), "b": {"c": (7, 3), "d": (1,)}},
    "zero_size": {"a": (0, 4), "b": (5,), "c": (0,)},
    "only_zero_size": {"a": (0,)},
    "no_leaves": {},
    "one_leaf": {"a": (70_001,)},
    "block_edges": [(4095,), (4096,), (4097,), (63,), (64,), (65,)],
    "fifty_leaves": [(3 * i + 1,) for i in range(50)],
    "threads": {"a": (500_003,), "b": [(777,), (3, 5, 7)], "c": (60_000, 2)},
}
WITHOUT_NATIVE = {"no_leaves"}


def is_shape(node: Any) -> bool:
    return isinstance(node, tuple)


def make(shapes: Any, dtype: Any, seed: int, batch: tuple[int, ...] = ()) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: array(rng.standard_normal(batch + s), dtype), shapes, is_leaf=is_shape)


def pick(tree: Any, i: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[i], tree)


def wide(tree: Any) -> list[np.ndarray]:
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]


def exact_dot(a: list[np.ndarray], b: list[np.ndarray]) -> tuple[float, float]:
    """The inner product and the sum of the magnitudes of its terms."""
    terms = [(u * v).ravel() for u, v in zip(a, b, strict=True)]
    flat = np.concatenate(terms) if terms else np.zeros(0)
    return float(flat.sum()), float(np.abs(flat).sum())


def close_dot(got: jax.Array, a: list[np.ndarray], b: list[np.ndarray]) -> None:
    """Blocked sums: the error is a few roundings (of the longest lane, plus the tree) of the sum of magnitudes."""
    exact, magnitude = exact_dot(a, b)
    eps = float(jnp.finfo(got.dtype).eps)
    np.testing.assert_allclose(np.float64(got), exact, rtol=0, atol=64 * eps * magnitude)


def close_tree(got: Any, exact: list[np.ndarray], scale: list[np.ndarray], dtype: Any) -> None:
    eps = float(jnp.finfo(dtype).eps)
    for g, e, s in zip(jax.tree.leaves(got), exact, scale, strict=True):
        assert g.dtype == dtype
        assert g.shape == e.shape
        assert np.all(np.abs(np.asarray(g, np.float64) - e) <= 4 * eps * s)


def skip_unless_supported(implementation: Implementation, case: str) -> None:
    if implementation == "native":
        if case in WITHOUT_NATIVE:
            pytest.skip("no leaves, so no dtype: the reference's")
        if not ffi.native_status().available:
            pytest.skip(ffi.native_status().reason)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", SHAPES)
class TestValues:
    def test_cg_update(self, case: str, implementation: Implementation, dtype: Any) -> None:
        skip_unless_supported(implementation, case)
        x, p, r, q = (make(SHAPES[case], dtype, seed) for seed in range(4))
        alpha = jnp.asarray(0.37, dtype)
        new_x, new_r, rr = quick_jit(partial(cg_update, implementation=implementation))(alpha, x, p, r, q)
        a = float(alpha)
        wx, wp, wr, wq = map(wide, (x, p, r, q))
        assert jax.tree.structure(new_x) == jax.tree.structure(x) == jax.tree.structure(new_r)
        close_tree(
            new_x,
            [u + a * v for u, v in zip(wx, wp, strict=True)],
            [abs(u) + abs(a * v) for u, v in zip(wx, wp, strict=True)],
            dtype,
        )
        close_tree(
            new_r,
            [u - a * v for u, v in zip(wr, wq, strict=True)],
            [abs(u) + abs(a * v) for u, v in zip(wr, wq, strict=True)],
            dtype,
        )
        assert rr.shape == ()
        assert rr.dtype == (jnp.float32 if case == "no_leaves" else dtype)
        close_dot(rr, wide(new_r), wide(new_r))

    def test_cg_direction(self, case: str, implementation: Implementation, dtype: Any) -> None:
        skip_unless_supported(implementation, case)
        z, p = (make(SHAPES[case], dtype, seed) for seed in (5, 6))
        beta = jnp.asarray(-1.7, dtype)
        got = quick_jit(partial(cg_direction, implementation=implementation))(beta, z, p)
        b = float(beta)
        wz, wp = wide(z), wide(p)
        assert jax.tree.structure(got) == jax.tree.structure(p)
        close_tree(
            got,
            [u + b * v for u, v in zip(wz, wp, strict=True)],
            [abs(u) + abs(b * v) for u, v in zip(wz, wp, strict=True)],
            dtype,
        )

    @pytest.mark.fast
    def test_dots(self, case: str, implementation: Implementation, dtype: Any) -> None:
        skip_unless_supported(implementation, case)
        p, q, r = (make(SHAPES[case], dtype, seed) for seed in (7, 8, 9))
        pairs = [(p, q), (p, p), (q, r)]
        got = quick_jit(partial(dots, implementation=implementation))(pairs)
        assert len(got) == 3
        for value, (a, b) in zip(got, pairs, strict=True):
            assert value.shape == ()
            close_dot(value, wide(a), wide(b))

    def test_the_three_products_of_an_iteration(self, case: str, implementation: Implementation, dtype: Any) -> None:
        """<p, q>, <p, p> and <q, q> together, which have a path of their own, are what they are one at a time."""
        skip_unless_supported(implementation, case)
        p, q = (make(SHAPES[case], dtype, seed) for seed in (9, 10))
        pairs = ((p, q), (p, p), (q, q))
        together = quick_jit(lambda p, q: dots(((p, q), (p, p), (q, q)), implementation=implementation))(p, q)
        by_itself = quick_jit(partial(dots, implementation=implementation))
        for got, pair in zip(together, pairs, strict=True):
            close_dot(got, wide(pair[0]), wide(pair[1]))
            if implementation == "native":
                (alone,) = by_itself((pair,))
                np.testing.assert_array_equal(got, alone)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
class TestTransformations:
    def test_vmap_over_any_operand(self, implementation: Implementation, dtype: Any) -> None:
        skip_unless_supported(implementation, "odd")
        shapes = SHAPES["odd"]
        batched = make(shapes, dtype, 1, batch=(3,))
        single = [make(shapes, dtype, seed) for seed in (2, 3, 4)]
        alphas = jnp.asarray([0.1, -2.0, 3.0], dtype)

        def update(alpha: jax.Array, x: Any, p: Any, r: Any, q: Any) -> Any:
            return cg_update(alpha, x, p, r, q, implementation=implementation)

        cases: list[tuple[Callable[..., Any], tuple[Any, ...], tuple[int | None, ...]]] = [
            (update, (alphas[0], batched, *single), (None, 0, None, None, None)),
            (update, (alphas, single[0], *single), (0, None, None, None, None)),
            (update, (alphas, single[0], single[1], single[2], batched), (0, None, None, None, 0)),
            (
                lambda b, z, p: cg_direction(b, z, p, implementation=implementation),
                (alphas, single[0], batched),
                (0, None, 0),
            ),
            (lambda a, b: dots([(a, b), (a, a)], implementation=implementation), (batched, single[0]), (0, None)),
        ]
        eps = float(jnp.finfo(dtype).eps)
        for f, operands, axes in cases:
            got = jax.vmap(f, in_axes=axes)(*operands)
            for i in range(3):
                member = [pick(o, i) if axis == 0 else o for o, axis in zip(operands, axes, strict=True)]
                for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(f(*member)), strict=True):
                    np.testing.assert_allclose(g[i], e, rtol=20 * eps, atol=100 * eps)

    def test_nested_vmap(self, implementation: Implementation) -> None:
        skip_unless_supported(implementation, "odd")
        a = make(SHAPES["odd"], jnp.float32, 1, batch=(2,))
        b = make(SHAPES["odd"], jnp.float32, 2, batch=(3,))

        def dot(u: Any, v: Any) -> jax.Array:
            return dots([(u, v)], implementation=implementation)[0]

        got = jax.vmap(jax.vmap(dot, (None, 0)), (0, None))(a, b)
        flat = [np.concatenate([leaf.reshape(len(leaf), -1) for leaf in wide(t)], axis=1) for t in (a, b)]
        np.testing.assert_allclose(got, flat[0] @ flat[1].T, rtol=1e-5, atol=1e-5)

    def test_while_loop_with_donation(self, implementation: Implementation) -> None:
        """Ten iterations in place give the same as ten calls, and the operands that live on are not overwritten."""
        skip_unless_supported(implementation, "odd")
        shapes = [(300, 41), (7,)]
        alpha, beta = jnp.float32(0.01), jnp.float32(0.5)

        def iteration(x: Any, r: Any, p: Any, q: Any) -> Any:
            new_x, new_r, rr = cg_update(alpha, x, p, r, q, implementation=implementation)
            return new_x, new_r, cg_direction(beta * rr / (1 + rr), new_r, p, implementation=implementation)

        def loop(x: Any, r: Any, p: Any, q: Any) -> Any:
            def body(carry: Any) -> Any:
                k, x, r, p = carry
                return (k + 1, *iteration(x, r, p, q))

            return jax.lax.while_loop(lambda carry: carry[0] < 10, body, (jnp.int32(0), x, r, p))[1:]

        x, r, p, q = (make(shapes, jnp.float32, seed) for seed in range(4))
        ex, er, ep = x, r, p
        for _ in range(10):
            ex, er, ep = iteration(ex, er, ep, q)
        kept = jax.tree.map(np.array, (x, r, p, q))
        got = jax.jit(loop)(x, r, p, q)
        jax.tree.map(np.testing.assert_array_equal, kept, (x, r, p, q))
        donated = jax.jit(loop, donate_argnums=(0, 1, 2))(x, r, p, q)
        for g, d, e in zip(*map(jax.tree.leaves, (got, donated, (ex, er, ep))), strict=True):
            np.testing.assert_array_equal(g, d)
            np.testing.assert_allclose(g, e, rtol=1e-5, atol=1e-5)

    def test_same_vector_twice(self, implementation: Implementation) -> None:
        """Operands may be the same array; aliasing then needs a copy, which XLA makes."""
        skip_unless_supported(implementation, "odd")
        v = make(SHAPES["block_edges"], jnp.float32, 0)
        new_x, new_r, rr = jax.jit(lambda v: cg_update(jnp.float32(0.25), v, v, v, v, implementation=implementation))(v)
        close_tree(new_x, [1.25 * u for u in wide(v)], [abs(u) for u in wide(v)], jnp.float32)
        close_tree(new_r, [0.75 * u for u in wide(v)], [abs(u) for u in wide(v)], jnp.float32)
        close_dot(rr, wide(new_r), wide(new_r))

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    @pytest.mark.parametrize("at", [0, 5000, 8199])
    def test_non_finite(self, implementation: Implementation, value: float, at: int) -> None:
        skip_unless_supported(implementation, "odd")
        clean = jnp.ones(8200, jnp.float32)
        dirty = clean.at[at].set(value)
        one = jnp.float32(1)
        new_x, _, rr = cg_update(one, dirty, clean, clean, dirty, implementation=implementation)
        assert np.flatnonzero(~np.isfinite(new_x)).tolist() == [at]
        assert np.isnan(rr) if np.isnan(value) else np.isposinf(rr)
        assert not np.isfinite(dots([(dirty, clean)], implementation=implementation)[0])
        direction = cg_direction(one, clean, dirty, implementation=implementation)
        assert np.flatnonzero(~np.isfinite(direction)).tolist() == [at]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", ["odd", "threads"])
def test_damping_is_folded_into_the_residual(case: str, implementation: Implementation) -> None:
    skip_unless_supported(implementation, case)
    x, p, r, q = (make(SHAPES[case], jnp.float32, seed) for seed in range(4))
    damped = jax.tree.map(lambda a, b: a + jnp.float32(0.7) * b, q, p)
    alpha = jnp.float32(0.3)
    folded = cg_update(alpha, x, p, r, q, lam=0.7, implementation=implementation)
    explicit = cg_update(alpha, x, p, r, damped, implementation=implementation)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), folded, explicit)


@pytest.mark.parametrize("batch", [(), (3,)])
def test_native_does_not_depend_on_threads(batch: tuple[int, ...]) -> None:
    skip_unless_supported("native", "threads")
    x, p, r, q = (make(SHAPES["threads"], jnp.float32, seed, batch) for seed in range(4))
    alpha = jnp.full(batch, 0.3, jnp.float32)

    def run(threads: int) -> Any:
        def one(alpha: jax.Array, x: Any, p: Any, r: Any, q: Any) -> Any:
            update = native.cg_update(alpha, 2 * alpha, x, p, r, q, threads=threads)
            return (
                update,
                native.cg_direction(alpha, r, p, threads=threads),
                native.dots([(p, q), (p, p)], threads=threads),
            )

        return (jax.vmap(one) if batch else one)(alpha, x, p, r, q)

    expected = run(1)
    for threads in (0, 2, 3, 8, 8, 8):
        jax.tree.map(np.testing.assert_array_equal, run(threads), expected)


def test_bfloat16_is_the_references() -> None:
    x, p, r, q = (make(SHAPES["odd"], jnp.bfloat16, seed) for seed in range(4))
    alpha = jnp.float32(0.5)
    new_x, new_r, rr = cg_update(alpha, x, p, r, q)
    assert rr.dtype == jnp.float32
    close_tree(
        new_x,
        [u + 0.5 * v for u, v in zip(wide(x), wide(p), strict=True)],
        [abs(u) + abs(v) for u, v in zip(wide(x), wide(p), strict=True)],
        jnp.bfloat16,
    )
    close_dot(rr, wide(new_r), wide(new_r))
    with pytest.raises(Unsupported, match="float32 or float64, and these have bfloat16"):
        cg_update(alpha, x, p, r, q, implementation="native")


def test_mixed_dtypes_are_the_references(x64: None) -> None:
    x = {"a": jnp.ones(5, jnp.float32), "b": jnp.ones(4, jnp.float64)}
    (rr,) = dots([(x, x)])
    assert rr.dtype == jnp.float64
    assert rr == 9
    with pytest.raises(Unsupported, match="leaves of one dtype"):
        dots([(x, x)], implementation="native")


def test_cross_lowering_takes_what_the_platform_has() -> None:
    """A function traced where the platform is the CPU lowers for another: to its handlers, or to the reference."""
    skip_unless_supported("native", "odd")
    x = jnp.ones(5000, jnp.float32)
    traced = jax.jit(lambda x: cg_update(jnp.float32(1), x, x, x, x, implementation="native")).trace(x)

    def lowered(platform: str) -> str:
        return traced.lower(lowering_platforms=(platform,)).as_text().replace("jit_curvax", "")

    assert "curvax_cg_update" in lowered("cpu")
    assert "threads" in lowered("cpu")
    assert "curvax" not in lowered("tpu")
    if not ffi.native_status("cuda").available:
        assert "curvax" not in lowered("cuda")
        return
    # Two blocks of 4096 elements leave two float64 terms of <r, r> in scratch memory.
    (call,) = [line for line in lowered("cuda").splitlines() if "custom_call" in line]
    assert "@curvax_cg_update" in call
    assert "-> (tensor<f32>, tensor<5000xf32>, tensor<5000xf32>, tensor<16xui8>)" in call
    assert call.count("output_operand_alias<") == 2


def test_in_place_in_a_loop() -> None:
    """The loop body holds no copy of a vector: the handlers write into the loop's own buffers."""
    skip_unless_supported("native", "odd")

    def loop(x: jax.Array, r: jax.Array, p: jax.Array, q: jax.Array) -> Any:
        def body(carry: Any) -> Any:
            k, x, r, p = carry
            x, r, rr = cg_update(jnp.float32(0.1), x, p, r, q, implementation="native")
            return k + 1, x, r, cg_direction(rr, r, p, implementation="native")

        return jax.lax.while_loop(lambda carry: carry[0] < 5, body, (jnp.int32(0), x, r, p))

    text = jax.jit(loop).lower(*(jnp.ones(1000, jnp.float32),) * 4).compile().as_text() or ""
    (body,) = [part for part in text.split("\n\n") if "custom_call_target" in part]
    assert [line for line in body.splitlines() if " copy(" in line and "f32[1000]" in line] == []


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_native_refuses_other_platforms_and_several_devices(op: Any) -> None:
    cannot = op.variant("native").cannot
    f32 = (np.dtype(np.float32),)
    assert "run on cpu and NVIDIA GPUs, and this is tpu" in cannot(Request("tpu", 1, f32, ((5,),)))
    assert "not partitioned" in cannot(Request("cpu", 2, f32, ((5,),)))
    assert "not partitioned" in cannot(Request("gpu", 2, f32, ((5,),), (9, 0)))
    assert "8.0 or newer, and this GPU's is 7.5" in cannot(Request("gpu", 1, f32, ((5,),), (7, 5)))
    assert "this GPU's is unknown" in cannot(Request("gpu", 1, f32, ((5,),)))


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_auto_takes_native_on_the_gpus_that_ran_it(op: Any) -> None:
    hopper = Request("gpu", 1, (np.dtype(np.float32),), ((2**16,),), (9, 0))
    status = ffi.native_status("cuda")
    assert op.variant("native").cannot(hopper) == (None if status.available else status.reason)
    assert op.variant("native").better_not(hopper) is None
    ampere = resolve(op, "auto", dataclasses.replace(hopper, capability=(8, 0)))
    assert ampere.implementation == "reference"
    assert "on Hopper GPUs alone" in ampere.reason or not status.available
    if status.available:
        assert resolve(op, "auto", hopper).implementation == "native"


def test_vectors_must_be_alike() -> None:
    a, b = {"w": jnp.ones(3)}, {"w": jnp.ones(4)}
    with pytest.raises(
        TypeError, match=r"dots: leaf 0 of pairs\[0\]\[1\] is float32\(4,\), of pairs\[0\]\[0\] float32\(3,\)"
    ):
        dots([(a, b)])
    with pytest.raises(TypeError, match="cg_direction: p has structure"):
        cg_direction(jnp.float32(1), a, {"v": jnp.ones(3)})
    with pytest.raises(ValueError, match="at least one pair"):
        dots([])
    with pytest.raises(ValueError, match="a list of tuples of two"):
        dots([(a, a, a)])  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
class TestOperands:
    def test_numpy_arrays_are_arrays(self, implementation: Implementation) -> None:
        """Of 64 bits too, where JAX has 32."""
        skip_unless_supported(implementation, "odd")
        v = np.arange(3.0)
        x, r, rr = cg_update(0.5, v, v, v, v, implementation=implementation)
        np.testing.assert_array_equal(x, 1.5 * v)
        np.testing.assert_array_equal(r, 0.5 * v)
        assert rr == 1.25
        np.testing.assert_array_equal(cg_direction(2.0, v, v, implementation=implementation), 3 * v)
        assert dots([(v, v)], implementation=implementation)[0] == 5

    @pytest.mark.parametrize("dtype", ["int32", "bool", "complex64"])
    def test_other_numbers_are_refused(self, dtype: str, implementation: Implementation) -> None:
        v = {"w": jnp.ones(3, dtype)}
        with pytest.raises(TypeError, match=rf"dots: leaf 0 of pairs\[0\]\[0\] is {dtype}: pass real floating"):
            dots([(v, v)], implementation=implementation)
        with pytest.raises(TypeError, match=f"cg_update: leaf 0 of x is {dtype}: pass real floating"):
            cg_update(1.0, v, v, v, v, implementation=implementation)

    def test_scalars_are_scalars(self, implementation: Implementation) -> None:
        v = jnp.ones(3)
        with pytest.raises(TypeError, match=r"cg_update: alpha is float32\(3,\): pass a real scalar"):
            cg_update(v, v, v, v, v, implementation=implementation)
        with pytest.raises(TypeError, match=r"cg_update: lam is float32\(3,\): pass a real scalar"):
            cg_update(1.0, v, v, v, v, lam=v, implementation=implementation)
        with pytest.raises(TypeError, match=r"cg_direction: beta is complex64\(\): pass a real scalar"):
            cg_direction(1j, v, v, implementation=implementation)  # pyright: ignore[reportArgumentType]
