"""One table of cases over every implementation of diagonal_update and diagonal_accumulate, against float64 NumPy."""

from __future__ import annotations

import dataclasses
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from curvax import ffi
from curvax.kernels import Implementation, Request, Unsupported
from curvax.kernels.diagonal_update import (
    OPS,
    AccumulateRule,
    DenominatorRule,
    DiagonalEstimate,
    UpdateRule,
    UpdateScalars,
    diagonal_accumulate,
    diagonal_update,
    native,
)
from curvax.tree import accumulation_dtype
from tests.oracle.compiling import array, quick_jit

IMPLEMENTATIONS: tuple[Implementation, ...] = ("reference", "native")

SHAPES: dict[str, list[tuple[int, ...]]] = {
    "scalar": [()],
    "odd": [(13,), (7, 3), (1,), (1, 5)],
    "zero_size": [(0, 4), (5,), (0,)],
    "only_zero_size": [(0,)],
    "no_leaves": [],
    "block_edges": [(4095,), (4096,), (4097,), (63,), (64,), (65,)],
    "fifty_leaves": [(3 * i + 1,) for i in range(50)],
    "threads": [(300_003,), (777,), (3, 5, 7), (60_000, 2)],
}
DTYPES = {
    "float32": (jnp.float32,),
    "float64": (jnp.float64,),
    "bfloat16": (jnp.bfloat16,),
    "float16": (jnp.float16,),
    "mixed": (jnp.bfloat16, jnp.float32, jnp.float64, jnp.float16),
}
RULES = {
    "sophia": UpdateRule(DenominatorRule("floor", slope=0.3), beta1=0.9, clip=1.0),
    "sophia_without_mean": UpdateRule(DenominatorRule("floor", slope=0.3), clip=0.5),
    "adahessian": UpdateRule(DenominatorRule("power"), beta1=0.9),
    "root": UpdateRule(DenominatorRule("power", power=0.5), beta1=0.9),
    "power": UpdateRule(DenominatorRule("power", power=0.7), beta1=0.9),
    "damped": UpdateRule(DenominatorRule("damped"), beta1=0.5),
}
SCALARS = UpdateScalars(mean_correction=1.3, correction=1.2, offset=0.05, fallback=0.7, weight_decay=0.1, rate=-0.01)


def skip_unless_supported(implementation: Implementation, case: str = "") -> None:
    if implementation == "native":
        if case == "no_leaves":
            pytest.skip("no leaves, so no dtype: the reference's")
        if not ffi.native_status().available:
            pytest.skip(ffi.native_status().reason)


@pytest.fixture(params=DTYPES)
def dtypes(request: pytest.FixtureRequest) -> tuple[Any, ...]:
    if request.param in ("float64", "mixed"):
        request.getfixturevalue("x64")
    return DTYPES[request.param]


@dataclasses.dataclass(frozen=True)
class Problem:
    params: list[jax.Array]
    mean: list[jax.Array] | None
    average: list[jax.Array]
    gradient: list[jax.Array]

    def run(self, rule: UpdateRule, implementation: Implementation, **options: Any) -> Any:
        f = quick_jit(partial(diagonal_update, rule, SCALARS, implementation=implementation, **options))
        return f(self.params, self.mean, self.average, self.gradient)


@cache
def updating(rule: UpdateRule, implementation: Implementation) -> Any:
    """(parameters, mean, average, gradient) -> the update, compiled once for all values of one size."""
    return quick_jit(partial(diagonal_update, rule, SCALARS, implementation=implementation))


def make(shapes: list[tuple[int, ...]], dtypes: tuple[Any, ...], seed: int, *, wide: bool = True) -> list[jax.Array]:
    rng = np.random.default_rng(seed)
    own = [dtypes[i % len(dtypes)] for i in range(len(shapes))]
    return [array(rng.normal(size=s), accumulation_dtype(d) if wide else d) for s, d in zip(shapes, own, strict=True)]


def problem(rule: UpdateRule, shapes: list[tuple[int, ...]], dtypes: tuple[Any, ...] = (jnp.float32,)) -> Problem:
    average = make(shapes, dtypes, 2)
    if rule.denominator.kind == "power":
        average = [abs(np.asarray(a)) for a in average]
    # Some entries have no curvature at all.
    average = [array(np.where(np.asarray(a) > 1.5, 0, a), a.dtype) for a in average]
    mean = make(shapes, dtypes, 1) if rule.beta1 else None
    return Problem(make(shapes, dtypes, 0, wide=False), mean, average, make(shapes, dtypes, 3))


def by_hand(rule: UpdateRule, at: Problem, i: int, decay: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """(new parameters before rounding, new mean) of leaf i, in float64."""
    p, a, g = (np.asarray(x[i], np.float64) for x in (at.params, at.average, at.gradient))
    m = g if at.mean is None else rule.beta1 * np.asarray(at.mean[i], np.float64) + (1 - rule.beta1) * g
    h = SCALARS.correction * a
    denominator = {
        "floor": lambda: np.maximum(rule.denominator.slope * h, SCALARS.offset),
        "power": lambda: h**rule.denominator.power + SCALARS.offset,
        "damped": lambda: np.maximum(h, 0) + SCALARS.offset,
    }[rule.denominator.kind]()
    direction = (m if at.mean is None else SCALARS.mean_correction * m) / denominator
    direction = np.clip(direction, -rule.clip, rule.clip) + (SCALARS.weight_decay * p if decay else 0)
    return p + SCALARS.rate * direction, m


def close(got: jax.Array, exact: np.ndarray, dtype: Any, ulps: float = 8) -> None:
    """Some roundings in the accumulation dtype and one to the leaf's own."""
    assert got.dtype == dtype and got.shape == exact.shape
    wide, own = float(jnp.finfo(accumulation_dtype(dtype)).eps), float(jnp.finfo(dtype).eps)
    bound = (ulps * wide + (own if own > wide else 0)) * (np.abs(exact) + 0.2)
    assert np.all(np.abs(np.asarray(got, np.float64) - exact) <= bound)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
class TestUpdate:
    @pytest.mark.fast
    @pytest.mark.parametrize("case", SHAPES)
    def test_shapes(self, case: str, implementation: Implementation) -> None:
        skip_unless_supported(implementation, case)
        rule, shapes = RULES["sophia"], SHAPES[case]
        at = problem(rule, shapes)
        new, mean, finite = at.run(rule, implementation)
        assert bool(finite) and len(new) == len(shapes)
        for i in range(len(shapes)):
            exact, m = by_hand(rule, at, i)
            close(new[i], exact, jnp.float32)
            close(mean[i], m, jnp.float32)

    @pytest.mark.parametrize("name", RULES)
    def test_rules_and_dtypes(self, name: str, dtypes: tuple[Any, ...], implementation: Implementation) -> None:
        skip_unless_supported(implementation)
        rule, shapes = RULES[name], [(5001,), (7, 3), (2, 2), (130,)]
        at = problem(rule, shapes, dtypes)
        new, mean, finite = at.run(rule, implementation)
        assert bool(finite)
        assert (mean is None) == (at.mean is None)
        for i, p in enumerate(at.params):
            exact, m = by_hand(rule, at, i)
            close(new[i], exact, p.dtype, ulps=64 if name == "power" else 16)
            if mean is not None:
                close(mean[i], m, accumulation_dtype(p.dtype))

    def test_decay_mask(self, implementation: Implementation) -> None:
        skip_unless_supported(implementation)
        rule, shapes = RULES["adahessian"], [(13,), (7, 3), (64,)]
        at = problem(rule, shapes)
        new, _, _ = at.run(rule, implementation, decay_mask=[True, False, True])
        for i, decay in enumerate((True, False, True)):
            close(new[i], by_hand(rule, at, i, decay)[0], jnp.float32)

    def test_no_curvature_takes_the_fallback(self, implementation: Implementation) -> None:
        skip_unless_supported(implementation)
        rule = UpdateRule(DenominatorRule("floor"))
        scalars = dataclasses.replace(SCALARS, offset=0.0, weight_decay=0.0)
        zero, one = [jnp.zeros(70)], [jnp.ones(70)]
        new, _, finite = diagonal_update(rule, scalars, zero, None, zero, one, implementation=implementation)
        assert bool(finite)
        np.testing.assert_allclose(new[0], -0.01 / 0.7, rtol=1e-6)

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("at_entry", [0, 4095, 9000])
    def test_a_gradient_that_is_not_finite(self, bad: float, at_entry: int, implementation: Implementation) -> None:
        """No parameter changes, and of the mean all but that entry does. (A clip makes a step of infinity.)"""
        skip_unless_supported(implementation)
        for name in ("adahessian", "sophia"):
            rule = RULES[name]
            at = problem(rule, [(9001,), (65,), (5,)])
            at.gradient[0] = at.gradient[0].at[at_entry].set(bad)
            new, mean, finite = updating(rule, implementation)(at.params, at.mean, at.average, at.gradient)
            taken = name == "sophia" and not np.isnan(bad)
            assert bool(finite) == taken
            assert all(np.array_equal(a, b) != taken for a, b in zip(new, at.params, strict=True))
            assert at.mean is not None
            assert float(mean[0][at_entry]) == float(at.mean[0][at_entry])
            others = np.arange(9001) != at_entry
            close(mean[0][others], by_hand(rule, at, 0)[1][others], jnp.float32)
            close(mean[2], by_hand(rule, at, 2)[1], jnp.float32)

    def test_overflow_of_the_last_rounding(self, implementation: Implementation) -> None:
        skip_unless_supported(implementation)
        rule = UpdateRule(DenominatorRule("damped"))
        params = [jnp.asarray([1.0] * 70 + [65000.0], jnp.float16), jnp.ones(5)]
        wide = [jnp.ones(71), jnp.ones(5)]
        up = dataclasses.replace(SCALARS, rate=1.0, offset=0.0)
        new, _, finite = diagonal_update(rule, up, params, None, wide, wide, implementation=implementation)
        assert not bool(finite)
        jax.tree.map(np.testing.assert_array_equal, new, params)

    def test_parameters_that_already_are_not_finite(self, implementation: Implementation) -> None:
        skip_unless_supported(implementation)
        at = problem(RULES["sophia"], [(33,), (4,)])
        at.params[0] = at.params[0].at[32].set(np.nan)
        new, _, finite = at.run(RULES["sophia"], implementation)
        assert not bool(finite)
        jax.tree.map(np.testing.assert_array_equal, new, at.params)

    def test_an_unsound_step_changes_nothing(self, implementation: Implementation) -> None:
        skip_unless_supported(implementation)
        rule = RULES["sophia"]
        at = problem(rule, SHAPES["block_edges"])
        new, mean, finite = at.run(rule, implementation, sound=jnp.asarray(False))
        assert not bool(finite)
        jax.tree.map(np.testing.assert_array_equal, (new, mean), (at.params, at.mean))

    def test_donation_and_loop(self, implementation: Implementation) -> None:
        """In place in a loop as out of it, and what lives on is not overwritten."""
        skip_unless_supported(implementation)
        rule = RULES["adahessian"]
        at = problem(rule, [(300, 41), (7,)])

        def loop(params: Any, mean: Any) -> Any:
            def body(i: jax.Array, carry: Any) -> Any:
                p, m, _ = carry
                return diagonal_update(rule, SCALARS, p, m, at.average, at.gradient, implementation=implementation)

            return jax.lax.fori_loop(0, 5, body, (params, mean, jnp.asarray(True)))

        kept = jax.tree.map(np.array, (at.params, at.mean))
        expected = (at.params, at.mean)
        for _ in range(5):
            p, m = expected
            expected = diagonal_update(rule, SCALARS, p, m, at.average, at.gradient, implementation="reference")[:2]
        plain = jax.jit(loop)(at.params, at.mean)
        jax.tree.map(np.testing.assert_array_equal, kept, (at.params, at.mean))
        donated = jax.jit(loop, donate_argnums=(0, 1))(at.params, at.mean)
        jax.tree.map(np.testing.assert_array_equal, plain, donated)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6), plain[:2], expected)

    def test_vmap_judges_each_member_by_itself(self, implementation: Implementation) -> None:
        skip_unless_supported(implementation)
        rule, shapes = RULES["adahessian"], [(4100,), (3, 2)]
        at = problem(rule, [(3, *s) for s in shapes])
        one = problem(rule, shapes)
        gradient = [at.gradient[0].at[1, 7].set(np.nan), at.gradient[1]]
        rates = jnp.asarray([-0.1, -0.2, 0.3])

        def step(rate: jax.Array, params: Any, gradient: Any) -> Any:
            scalars = dataclasses.replace(SCALARS, rate=rate)
            return diagonal_update(
                rule, scalars, params, one.mean, one.average, gradient, implementation=implementation
            )

        for axes, params in (((0, 0, 0), at.params), ((0, None, 0), one.params)):
            new, mean, finite = jax.jit(jax.vmap(step, axes))(rates, params, gradient)
            assert finite.tolist() == [True, False, True]
            for i in range(3):
                own = params if axes[1] is None else [p[i] for p in params]
                want = step(rates[i], own, [g[i] for g in gradient])
                for got, expected in zip(jax.tree.leaves((new, mean)), jax.tree.leaves(want[:2]), strict=True):
                    np.testing.assert_allclose(got[i], expected, rtol=1e-6, atol=1e-6)

    def test_shard_map(self, implementation: Implementation) -> None:
        skip_unless_supported(implementation)
        rule = RULES["sophia"]
        at = problem(rule, [(8, 5), (4,)])
        mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))

        def step(params: Any, gradient: Any) -> Any:
            new, mean, finite = diagonal_update(
                rule, SCALARS, params, at.mean, at.average, gradient, implementation=implementation
            )
            return new, mean, finite[None]

        specs = [P("i"), P("i")]
        with jax.set_mesh(mesh):
            new, _, _ = jax.jit(jax.shard_map(step, in_specs=(specs, specs), out_specs=P("i")))(at.params, at.gradient)
        want, _, _ = at.run(rule, "reference")
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), new, want)

    @pytest.mark.parametrize("bad", [False, True])
    def test_large_trees_look_first(
        self, bad: bool, implementation: Implementation, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Without room for a copy the handlers look before they write; the outcome is the same."""
        skip_unless_supported(implementation)
        for name in ("sophia", "sophia_without_mean"):
            rule = RULES[name]
            at = problem(rule, [(9001,), (65,), (5,)], (jnp.float32, jnp.bfloat16))
            if bad:
                at.gradient[1] = at.gradient[1].at[64].set(np.nan)
            copied = at.run(rule, implementation)
            monkeypatch.setattr(native, "_COPY_BYTES", 0)
            looked = at.run(rule, implementation)
            monkeypatch.undo()
            assert bool(looked[2]) is not bad
            jax.tree.map(np.testing.assert_array_equal, looked, copied)

    def test_results_without_copies_are_what_large_trees_ask_for(self, implementation: Implementation) -> None:
        skip_unless_supported(implementation)
        rule = UpdateRule(DenominatorRule("damped"))

        def results(n: int) -> int:
            leaf = [jax.ShapeDtypeStruct((n,), jnp.float32)]
            step = partial(diagonal_update, rule, SCALARS, implementation=implementation)
            text = jax.jit(step).trace(leaf, None, leaf, leaf).lower(lowering_platforms=("cpu",)).as_text()
            calls = [line for line in text.splitlines() if "@curvax_diagonal_update" in line]
            return calls[0].rpartition("->")[2].count("tensor") if calls else 0

        expected = [3, 2] if implementation == "native" else [0, 0]
        assert [results(2**23), results(2**23 + 1)] == expected


ESTIMATES = ("value", "square", "product", "magnitude")


def estimate(kind: Any, a: Any, b: Any) -> DiagonalEstimate:
    return DiagonalEstimate((a, b) if kind in ("product", "magnitude") else (a,), kind)


def value_by_hand(kind: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return {"value": a, "square": a * a, "product": a * b, "magnitude": np.abs(a * b)}[kind]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
class TestAccumulate:
    @pytest.mark.parametrize("rms", [False, True])
    @pytest.mark.parametrize("kind", ESTIMATES)
    @pytest.mark.parametrize("case", ["odd", "zero_size", "no_leaves", "block_edges", "threads"])
    def test_values(self, case: str, kind: str, rms: bool, implementation: Implementation) -> None:
        skip_unless_supported(implementation, case)
        average, a, b = (make(SHAPES[case], (jnp.float32,), seed) for seed in (1, 2, 3))
        average = list(map(jnp.abs, average)) if rms else average
        f = quick_jit(partial(diagonal_accumulate, AccumulateRule(0.9, rms), implementation=implementation))
        new, scale, finite = f(average, estimate(kind, a, b), 1.7)
        assert bool(finite) and scale.dtype == jnp.float32
        magnitudes = [np.zeros(0)]
        for got, old, x, y in zip(new, average, a, b, strict=True):
            o, d = (
                np.asarray(old, np.float64),
                value_by_hand(kind, np.asarray(x, np.float64), np.asarray(y, np.float64)),
            )
            exact = np.sqrt(0.9 * o**2 + 0.1 * d**2) if rms else 0.9 * o + 0.1 * d
            np.testing.assert_allclose(got, exact, rtol=2e-6, atol=1e-6)
            magnitudes.append(np.abs(exact).ravel())
        flat = np.concatenate(magnitudes)
        np.testing.assert_allclose(scale, 1.7 * flat.mean() if flat.size else 0.0, rtol=1e-5)

    @pytest.mark.parametrize("kind", ESTIMATES)
    def test_narrow_factors_are_widened_first(self, kind: str, implementation: Implementation) -> None:
        """300^2 is beyond float16, and one factor may be narrower than the other."""
        skip_unless_supported(implementation)
        a, b = [jnp.full(3, 300, jnp.float16)], [jnp.full(3, -300.5, jnp.float32)]
        new, _, finite = diagonal_accumulate(
            AccumulateRule(0.0), [jnp.ones(3)], estimate(kind, a, b), implementation=implementation
        )
        exact = value_by_hand(kind, np.full(3, 300.0), np.full(3, -300.5))
        assert bool(finite)
        np.testing.assert_allclose(new[0], exact, rtol=1e-6)

    @pytest.mark.parametrize("dtype", ["float64", "mixed"])
    def test_float64(self, dtype: str, implementation: Implementation, x64: None) -> None:
        skip_unless_supported(implementation)
        shapes = [(5001,), (7, 3), (4,)]
        average, a, b = (make(shapes, DTYPES[dtype], seed) for seed in (1, 2, 3))
        rule = AccumulateRule(0.99)
        new, scale, _ = diagonal_accumulate(rule, average, estimate("product", a, b), implementation=implementation)
        assert scale.dtype == jnp.float64
        total = 0.0
        for got, old, x, y in zip(new, average, a, b, strict=True):
            exact = 0.99 * np.asarray(old, np.float64) + 0.01 * np.asarray(x, np.float64) * np.asarray(y, np.float64)
            tolerance = 1e-14 if old.dtype == jnp.float64 else 1e-6
            np.testing.assert_allclose(got, exact, rtol=tolerance, atol=tolerance)
            total += np.abs(exact).sum()
        count = sum(leaf.size for leaf in new)
        np.testing.assert_allclose(scale, total / count, rtol=1e-13 if dtype == "float64" else 1e-6)

    @pytest.mark.parametrize(
        ("leaf", "means"),
        [
            ((50, 130), (50, 1)),
            ((50, 130), (1, 130)),
            ((50, 130), (1, 1)),
            ((3, 3, 40, 50), (1, 1, 40, 50)),
            ((9, 40, 3, 5), (1, 40, 1, 1)),
            ((9, 40, 3, 5), (9, 1, 3, 5)),
            ((3, 1, 5), (3, 1, 1)),
        ],
    )
    @pytest.mark.parametrize("batch", [(), (2,)])
    def test_block_means(self, leaf: Any, means: Any, batch: Any, implementation: Implementation) -> None:
        skip_unless_supported(implementation)
        average, compact = (make([(*batch, *s)], (jnp.float32,), 1) for s in (leaf, means))
        written = [jnp.broadcast_to(compact[0], average[0].shape)]

        def mix(average: Any, d: Any) -> Any:
            return diagonal_accumulate(
                AccumulateRule(0.5), average, DiagonalEstimate((d,)), implementation=implementation
            )

        f = quick_jit(jax.vmap(mix) if batch else mix)
        got, want = f(average, compact), f(average, written)
        jax.tree.map(np.testing.assert_array_equal, got, want)
        np.testing.assert_allclose(got[0][0], 0.5 * average[0] + 0.5 * written[0], rtol=1e-6)

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    @pytest.mark.parametrize("copy_bytes", [0, 2**20])
    def test_not_finite(
        self, bad: float, copy_bytes: int, implementation: Implementation, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        skip_unless_supported(implementation)
        monkeypatch.setattr(native, "_COPY_BYTES", copy_bytes)
        average, a = (make([(9000,), (65,)], (jnp.float32,), seed) for seed in (1, 2))
        spoiled = [a[0], a[1].at[64].set(bad)]
        for rms in (False, True):
            mix = partial(diagonal_accumulate, AccumulateRule(0.9, rms), implementation=implementation)
            new, scale, finite = jax.jit(mix)(average, DiagonalEstimate((spoiled,)))
            assert not bool(finite) and not np.isfinite(scale)
            jax.tree.map(np.testing.assert_array_equal, new, average)
            new, _, finite = jax.jit(mix)(average, DiagonalEstimate((a,)))
            assert bool(finite) and not np.array_equal(new[0], average[0])

    def test_root_mean_square_neither_overflows_nor_underflows(self, implementation: Implementation) -> None:
        skip_unless_supported(implementation)
        for scale in (1e-30, 1e30):
            average, a = ([jnp.asarray([3.0 * scale, 0.0, scale] * 30)], [jnp.asarray([4.0 * scale, 0.0, 0.0] * 30)])
            rule = AccumulateRule(0.5, root_mean_square=True)
            new, _, finite = diagonal_accumulate(rule, average, DiagonalEstimate((a,)), implementation=implementation)
            assert bool(finite)
            np.testing.assert_allclose(new[0][:3], [5 * scale / 2**0.5, 0.0, scale / 2**0.5], rtol=1e-6)


class TestErrors:
    def test_trees_that_do_not_go_together(self) -> None:
        at = problem(RULES["adahessian"], [(3,), (2, 2)])
        rule = RULES["adahessian"]
        with pytest.raises(TypeError, match=r"leaf 0 of gradient is float32\(4,\), expected float32\(3,\)"):
            diagonal_update(rule, SCALARS, at.params, at.mean, at.average, [jnp.zeros(4), at.gradient[1]])
        with pytest.raises(TypeError, match="average has structure"):
            diagonal_update(rule, SCALARS, at.params, at.mean, at.average[:1], at.gradient)
        with pytest.raises(TypeError, match="leaf 1 of mean is bfloat16"):
            narrow = [at.gradient[0], at.gradient[1].astype(jnp.bfloat16)]
            diagonal_update(rule, SCALARS, at.params, narrow, at.average, at.gradient)
        with pytest.raises(ValueError, match=r"beta1 0\.9 and mean do not go together"):
            diagonal_update(rule, SCALARS, at.params, None, at.average, at.gradient)
        with pytest.raises(ValueError, match='kind "product" has 2 factors, not 1'):
            diagonal_accumulate(AccumulateRule(0.9), at.average, DiagonalEstimate((at.gradient,), "product"))
        with pytest.raises(TypeError, match=r"leaf 0 of factor 0 of the estimate has shape \(1,\), expected \(3,\)"):
            squares = [jnp.zeros(1), jnp.zeros((2, 2))]
            diagonal_accumulate(AccumulateRule(0.9), at.average, DiagonalEstimate((squares,), "square"))

    def test_scalars_and_masks(self) -> None:
        at, rule = problem(RULES["adahessian"], [(3,)]), RULES["adahessian"]
        for wrong in (jnp.int32(1), jnp.ones(3, bool)):
            with pytest.raises(TypeError, match="pass one boolean, such as"):
                at.run(rule, "reference", sound=wrong)
        with pytest.raises(TypeError, match=r"rate is float32\(3,\): pass a real scalar"):
            vector = dataclasses.replace(SCALARS, rate=jnp.ones(3))
            diagonal_update(rule, vector, at.params, at.mean, at.average, at.gradient)
        with pytest.raises(TypeError, match="decay_mask has arrays for leaves"):
            at.run(rule, "reference", decay_mask=[jnp.ones(3, bool)])
        with pytest.raises(TypeError, match="leaf 0 of factor 0 of the estimate is int32"):
            whole = DiagonalEstimate(([jnp.ones(3, jnp.int32)],))
            diagonal_accumulate(AccumulateRule(0.9), at.average, whole)

    def test_kinds_that_there_are_not(self) -> None:
        with pytest.raises(ValueError, match="a denominator is one of floor, power, damped, got 'root'"):
            DenominatorRule("root")  # pyright: ignore[reportArgumentType]
        with pytest.raises(ValueError, match="an estimate is one of value, square, product, magnitude, got 'cube'"):
            DiagonalEstimate(([],), "cube")  # pyright: ignore[reportArgumentType]

    def test_what_the_native_handlers_refuse(self) -> None:
        on = Request.of([jnp.zeros(3)])
        assert "and this is tpu" in str(native.cannot(dataclasses.replace(on, platform="tpu")))
        assert "8 devices" in str(native.cannot(dataclasses.replace(on, devices=8)))
        assert "these have int32" in str(native.cannot(dataclasses.replace(on, dtypes=(np.dtype(np.int32),))))
        assert "no leaves" in str(native.cannot(Request.of([])))

    def test_an_implementation_that_is_not_there(self) -> None:
        at = problem(RULES["adahessian"], [(3,)])
        for op in OPS:
            assert [variant.name for variant in op.variants] == ["native", "reference"]
        with pytest.raises(Unsupported, match="diagonal_update has no pallas implementation"):
            at.run(RULES["adahessian"], "pallas")


def test_the_number_of_threads_changes_nothing() -> None:
    skip_unless_supported("native")
    rule = RULES["sophia"]
    at = problem(rule, SHAPES["threads"])
    decays = (True,) * len(at.params)
    results = [
        native.diagonal_update(
            rule, SCALARS, at.params, at.mean, at.average, at.gradient, jnp.asarray(True), decays, threads=threads
        )
        for threads in (1, 2, 5)
    ]
    for other in results[1:]:
        jax.tree.map(np.testing.assert_array_equal, results[0], other)
    factors = DiagonalEstimate((at.gradient,), "square")
    sums = [
        native.diagonal_accumulate(AccumulateRule(0.9), at.average, factors, jnp.ones(()), threads=threads)
        for threads in (1, 2, 5)
    ]
    for other in sums[1:]:
        jax.tree.map(np.testing.assert_array_equal, sums[0], other)
