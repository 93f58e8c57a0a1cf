"""One table of cases over every implementation of gram_accumulate that runs here, against explicit float64 rows."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax.kernels import Implementation, Request, Unsupported
from curvax.kernels.gram_accumulate import GRAM_ACCUMULATE, gram_accumulate, gram_of_layers, native
from curvax.kernels.gram_accumulate.factors import Rows, formed_is_cheaper, rows
from tests.oracle.compiling import array, quick_jit

IMPLEMENTATIONS: tuple[Implementation, ...] = ("reference", "triton", "native")


def drawn(rng: np.random.Generator, dtype: Any, *shape: int) -> jax.Array:
    return array(rng.standard_normal(shape), dtype)


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes of one call; `into` None for explicit rows, `positions` None for factors without that axis."""

    groups: int
    per_group: int
    into: int | None
    out: int
    positions: int | None = None

    def make(self, seed: int, dtype: Any, groups: int | None = None) -> tuple[Any, Any]:
        rng = np.random.default_rng(seed)
        groups = self.groups if groups is None else groups
        at = () if self.positions is None else (self.positions,)
        d = drawn(rng, dtype, groups, self.per_group, *at, self.out)
        return None if self.into is None else drawn(rng, dtype, groups, *at, self.into), d

    def gram(self, seed: int, dtype: Any, columns: int | None = None) -> Any:
        total = self.groups * self.per_group
        return drawn(np.random.default_rng(seed), dtype, total, total if columns is None else columns * self.per_group)


CASES = {
    "one_row": Case(1, 1, 1, 1),
    "one_group": Case(1, 5, 7, 3),
    "odd": Case(7, 3, 5, 4),
    "a_row_per_group": Case(33, 1, 17, 9),
    "two_rows_per_group": Case(35, 2, 17, 9),
    "several_tiles": Case(70, 3, 40, 33),
    "a_group_over_several_tiles": Case(2, 150, 3, 2),
    "one_column_each": Case(12, 10, 1, 1),
    "wide": Case(4, 10, 700, 130),
    "explicit": Case(9, 4, None, 37),
    "explicit_one_row_per_group": Case(70, 1, None, 300),
    "positions_kept": Case(11, 2, 40, 6, positions=3),
    "positions_formed": Case(5, 2, 4, 6, positions=9),
    "one_position": Case(5, 2, 4, 6, positions=1),
    "one_less_than_a_tile": Case(255, 1, 3, 5),
    "one_more_than_a_tile": Case(257, 1, 5, 3),
    "examples_across_tiles": Case(111, 9, 13, 8),
    "several_sums": Case(10, 3, 600, 513),
    "no_groups": Case(0, 3, 4, 5),
    "no_entries": Case(3, 2, 0, 5),
    "no_cotangent_entries": Case(3, 2, 4, 0),
}
# Rows of 16 bits are upcast where they are read, and what follows is float32's: cases that read them in other ways.
NARROW = ("odd", "several_tiles", "one_more_than_a_tile", "explicit", "positions_kept", "positions_formed")


def explicit(a: Any, d: Any) -> tuple[np.ndarray, np.ndarray]:
    """Rows in float64 and the sums of the magnitudes of their terms."""
    d = np.asarray(d, np.float64)
    if a is None:
        flat = d.reshape(d.shape[0] * d.shape[1], d.shape[2])
        return flat, np.abs(flat)
    a = np.asarray(a, np.float64)
    if a.ndim == 2:
        a, d = a[:, None], d[:, :, None]

    def form(a: np.ndarray, d: np.ndarray) -> np.ndarray:
        made = np.einsum("bti,brto->brio", a, d)
        return made.reshape(made.shape[0] * made.shape[1], made.shape[2] * made.shape[3])

    return form(a, d), form(np.abs(a), np.abs(d))


def check(got: jax.Array, gram: Any, left: Any, right: Any = None) -> None:
    """Up to a few dozen roundings of the sum of magnitudes, for three-term TF32 as for float32."""
    (x, x_size), (y, y_size) = explicit(*left), explicit(*(left if right is None else right))
    exact, size = np.asarray(gram, np.float64) + x @ y.T, np.abs(np.asarray(gram, np.float64)) + x_size @ y_size.T
    assert got.shape == gram.shape and got.dtype == gram.dtype
    error = np.abs(np.asarray(got, np.float64) - exact)
    if right is None:
        error = np.tril(error)
    assert np.all(error <= 64 * float(jnp.finfo(got.dtype).eps) * size)


def skip_unless_supported(implementation: Implementation, *operands: Any) -> None:
    variant = GRAM_ACCUMULATE.variant(implementation)
    reason = None if variant is None else variant.cannot(Request.of(*operands))
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(params=["float32", "float64", "bfloat16", "float16"])
def dtypes(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """Of the sum and of the rows."""
    if request.param == "float64":
        request.getfixturevalue("x64")
    return jnp.dtype("float32" if request.param.endswith("16") else request.param), jnp.dtype(request.param)


def each_dtype(cases: Iterable[Any], narrow: Iterable[Any]) -> list[tuple[str, Any]]:
    """Pairs: all cases in 32 and 64 bits, those of `narrow` in 16 bits too."""
    wide = itertools.product(("float32", "float64"), cases)
    return [*wide, *itertools.product(("bfloat16", "float16"), narrow)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
class TestValues:
    @pytest.mark.parametrize(("dtypes", "case"), each_dtype(CASES, NARROW), indirect=["dtypes"])
    def test_lower_triangle(self, case: str, implementation: Implementation, dtypes: tuple[Any, Any]) -> None:
        (a, d), gram = CASES[case].make(1, dtypes[1]), CASES[case].gram(2, dtypes[0])
        skip_unless_supported(implementation, gram, a, d)
        check(quick_jit(partial(gram_accumulate, implementation=implementation))(gram, a, d), gram, (a, d))

    @pytest.mark.fast
    @pytest.mark.parametrize("case", ["odd", "several_tiles", "explicit", "positions_kept", "positions_formed"])
    def test_against_other_groups(self, case: str, implementation: Implementation, dtypes: tuple[Any, Any]) -> None:
        left, right = CASES[case].make(1, dtypes[1]), CASES[case].make(2, dtypes[1], groups=5)
        gram = CASES[case].gram(3, dtypes[0], columns=5)
        skip_unless_supported(implementation, gram, left)

        def call(gram: Any, left: Any, right: Any) -> jax.Array:
            return gram_accumulate(gram, *left, against=right, implementation=implementation)

        check(quick_jit(call)(gram, left, right), gram, left, right)

    @pytest.mark.fast
    def test_layers_add_up(self, implementation: Implementation) -> None:
        """What stands above the diagonal after one layer does not come back below it after the next."""
        first, second = CASES["several_tiles"], Case(70, 3, None, 20)
        gram = jnp.zeros((210, 210), jnp.float32)
        skip_unless_supported(implementation, gram)
        (a, d), (_, e) = first.make(1, jnp.float32), second.make(2, jnp.float32)

        @jax.jit
        def both(gram: jax.Array) -> jax.Array:
            once = gram_accumulate(gram, a, d, implementation=implementation)
            return gram_accumulate(once, None, e, implementation=implementation)

        (x, x_size), (y, y_size) = explicit(a, d), explicit(None, e)
        rows, size = np.concatenate([x, y], 1), np.concatenate([x_size, y_size], 1)
        error = np.tril(np.abs(np.asarray(both(gram), np.float64) - rows @ rows.T))
        assert np.all(error <= 64 * float(jnp.finfo(jnp.float32).eps) * (size @ size.T))


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A layer of several blocks; `into` None for explicit rows."""

    blocks: int
    into: int | None
    out: int
    positions: int = 1

    def make(self, seed: int, dtype: Any, groups: int, per_group: int) -> tuple[Any, Any]:
        rng = np.random.default_rng(seed)
        at = () if self.into is None else (self.positions,)
        d = drawn(rng, dtype, groups, self.blocks, per_group, *at, self.out)
        return None if self.into is None else drawn(rng, dtype, groups, self.blocks, self.positions, self.into), d


LAYERS = {
    "one": [Blocks(1, 5, 4)],
    "dense": [Blocks(1, 40, 33), Blocks(1, 34, 3), Blocks(1, None, 7)],
    "blocks": [Blocks(3, 4, 5, positions=2), Blocks(2, None, 6), Blocks(1, 3, 8, positions=2)],
    "formed": [Blocks(1, 2, 3, positions=9), Blocks(2, 2, 3, positions=9)],
    "empty": [Blocks(1, 0, 3), Blocks(1, 4, 3), Blocks(1, None, 0)],
    "nothing": [Blocks(1, 0, 3)],
}
# All layers in the size that is neither one row nor several tiles; the other sizes where blocks and forms differ.
NARROW_WHOLE = [(name, 23, 3) for name in LAYERS if name != "nothing"]
WHOLE = [
    *((name, 23, 3) for name in LAYERS),
    *((name, *size) for name in ("dense", "blocks", "formed") for size in ((1, 1), (70, 4))),
]


def rows_of_layers(layers: Any) -> tuple[np.ndarray, np.ndarray]:
    """As `explicit`, the entries of all blocks and layers side by side."""
    found = []
    for a, d in jax.tree.map(np.asarray, layers):
        for block in range(d.shape[1]):
            found.append(explicit(None if a is None else a[:, block], d[:, block]))
    rows, sizes = zip(*found, strict=True)
    return np.concatenate(rows, 1), np.concatenate(sizes, 1)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
class TestWhole:
    @pytest.mark.parametrize(("dtypes", "case"), each_dtype(WHOLE, NARROW_WHOLE), indirect=["dtypes"])
    def test_values(self, case: tuple[str, int, int], implementation: Implementation, dtypes: tuple[Any, Any]) -> None:
        name, groups, per_group = case
        layers = [layer.make(seed, dtypes[1], groups, per_group) for seed, layer in enumerate(LAYERS[name])]
        skip_unless_supported(implementation, np.zeros((2, 2), dtypes[0]), layers)
        call = partial(gram_of_layers, dtype=dtypes[0], implementation=implementation)
        got = np.asarray(quick_jit(call)(layers))
        rows, size = rows_of_layers(layers)
        assert got.shape == (groups * per_group,) * 2 and got.dtype == dtypes[0]
        assert np.all(abs(got - rows @ rows.T) <= 64 * float(jnp.finfo(dtypes[0]).eps) * (size @ size.T))
        np.testing.assert_array_equal(got, got.T)

    def test_vmap(self, implementation: Implementation) -> None:
        many = [
            [layer.make(seed + 9 * s, jnp.float32, 5, 2) for seed, layer in enumerate(LAYERS["dense"])] for s in (0, 1)
        ]
        skip_unless_supported(implementation, jnp.zeros((2, 2), jnp.float32))
        call = jax.jit(partial(gram_of_layers, dtype=np.dtype(np.float32), implementation=implementation))
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *many)
        got = jax.jit(jax.vmap(call))(stacked)
        for i in (0, 1):
            np.testing.assert_allclose(got[i], call(many[i]), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("case", ["odd", "several_tiles", "positions_kept", "examples_across_tiles"])
def test_native_does_not_depend_on_threads(case: str) -> None:
    gram = CASES[case].gram(2, jnp.float32)
    skip_unless_supported("native", gram)
    left, right = (rows("", *CASES[case].make(seed, jnp.float32)) for seed in (1, 2))

    def call(right: Rows | None, threads: int) -> np.ndarray:
        return np.asarray(native.accumulate(gram, left, right, threads=threads))

    for other in (None, right):
        # Tiles are cut by the number of threads, sums are not.
        want = call(other, 1)
        for threads in (2, 3, 8):
            got = call(other, threads)
            np.testing.assert_array_equal(*((want, got) if other is not None else (np.tril(want), np.tril(got))))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
class TestTransformations:
    def test_vmap_over_any_operand(self, implementation: Implementation) -> None:
        case = CASES["several_tiles"]
        skip_unless_supported(implementation, case.gram(0, jnp.float32))
        grams = jnp.stack([case.gram(s, jnp.float32) for s in range(3)])
        many = [case.make(s, jnp.float32) for s in range(3)]
        a, d = (jnp.stack(x) for x in zip(*many, strict=True))
        call = partial(gram_accumulate, implementation=implementation)
        for axes in ((0, 0, 0), (0, None, 0), (None, 0, None), (0, None, None)):
            operands = [x if axis == 0 else x[0] for x, axis in zip((grams, a, d), axes, strict=True)]
            got = jax.jit(jax.vmap(call, in_axes=axes))(*operands)
            for i in range(3):
                gram, b, e = (x[i] if axis == 0 else x for x, axis in zip(operands, axes, strict=True))
                check(got[i], gram, (b, e))

    def test_nested_vmap(self, implementation: Implementation) -> None:
        case = CASES["odd"]
        skip_unless_supported(implementation, case.gram(0, jnp.float32))
        (a, d), gram = case.make(1, jnp.float32), case.gram(2, jnp.float32)
        scale = jnp.asarray([1.0, -2.0], jnp.float32)
        call = partial(gram_accumulate, implementation=implementation)

        def scaled(s: jax.Array, u: jax.Array) -> jax.Array:
            return call(gram, s * a, u * d)

        got = jax.vmap(jax.vmap(scaled, (None, 0)), (0, None))(scale, scale)
        for i in range(2):
            for j in range(2):
                check(got[i, j], gram, (scale[i] * a, scale[j] * d))

    def test_shard_map(self, implementation: Implementation) -> None:
        """Each device adds its rows against all rows."""
        case = CASES["several_tiles"]
        (a, d), gram = case.make(1, jnp.float32), case.gram(2, jnp.float32)
        mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
        split = jax.sharding.PartitionSpec("x")
        skip_unless_supported(implementation, gram)

        def local(gram: jax.Array, a: jax.Array, d: jax.Array) -> jax.Array:
            everyone = jax.lax.all_gather(a, "x", tiled=True), jax.lax.all_gather(d, "x", tiled=True)
            return gram_accumulate(gram, a, d, against=everyone, implementation=implementation)

        sharded = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(split, split, split), out_specs=split))
        check(sharded(gram, a, d), gram, (a, d), (a, d))

    @pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
    def test_non_finite_and_huge(self, implementation: Implementation, value: float) -> None:
        """An example that is not finite makes its own rows and columns so, and no others."""
        case = CASES["two_rows_per_group"]
        (a, d), gram = case.make(1, jnp.float32), case.gram(2, jnp.float32)
        skip_unless_supported(implementation, gram)
        dirty = gram_accumulate(gram, a.at[3].set(value), d, implementation=implementation)
        clean = np.ones(70, bool)
        clean[6:8] = False
        finite = np.isfinite(np.asarray(dirty))
        check(dirty[clean][:, clean], gram[clean][:, clean], (a[clean[::2]], d[clean[::2]]))
        assert not finite[6, 6] and not finite[7, 7]


def test_positions_take_the_cheaper_form() -> None:
    """T^2 against the entries of an activation."""
    kept, formed = (rows("", *CASES[n].make(0, jnp.float32)) for n in ("positions_kept", "positions_formed"))
    assert not formed_is_cheaper(kept, kept, triangle=True)
    assert formed_is_cheaper(formed, formed, triangle=True)


def test_reference_takes_half_the_products() -> None:
    """The compiled reference does five eighths of the multiplications of the whole matrix: four panels."""
    case = Case(96, 10, 64, 256)
    (a, d), gram = case.make(0, jnp.float32), case.gram(0, jnp.float32)
    call = jax.jit(partial(gram_accumulate, implementation="reference"))
    flops = (call.lower(gram, a, d).compile().cost_analysis() or {})["flops"]
    assert flops < 0.66 * 2 * 960**2 * 256


def test_probe_names_what_stands_in_the_way() -> None:
    cannot = GRAM_ACCUMULATE.variants[0].cannot
    f32, f64 = (np.dtype(np.float32),), (np.dtype(np.float64),)
    assert "NVIDIA GPUs, and this is cpu" in str(cannot(Request("cpu", 1, f32, ())))
    assert "this device's is 7.5" in str(cannot(Request("gpu", 1, f32, (), (7, 5))))
    assert "these operands are float64" in str(cannot(Request("gpu", 1, f64, (), (9, 0))))
    assert "there are 4 devices" in str(cannot(Request("gpu", 4, f32, (), (9, 0))))
    assert "runs on cpu, and this is gpu" in str(native.cannot(Request("gpu", 1, f32, (), (9, 0))))
    assert "there are 4 devices" in str(native.cannot(Request("cpu", 4, f32, ())))
    timed = Request("gpu", 1, f32, ((1024, 1024),), (9, 0))
    better_not = GRAM_ACCUMULATE.variants[0].better_not
    assert better_not(timed) is None
    assert "below 1024 rows, and these are 512" in str(better_not(dataclasses.replace(timed, shapes=((512, 512),))))
    assert "on Hopper GPUs alone" in str(better_not(dataclasses.replace(timed, capability=(8, 0))))
    assert "below 8 rows, and these are 7" in str(native.better_not(Request("cpu", 1, f32, ((7, 7),))))


def test_cross_lowering_takes_the_reference() -> None:
    (a, d), gram = CASES["odd"].make(0, jnp.float32), CASES["odd"].gram(0, jnp.float32)
    lowered = jax.jit(gram_accumulate).trace(gram, a, d).lower(lowering_platforms=("cuda",))
    assert "stablehlo.dot_general" in lowered.as_text()


def test_errors(x64: None) -> None:
    gram, a, d = jnp.zeros((6, 6), jnp.float32), jnp.zeros((2, 4), jnp.float32), jnp.zeros((2, 3, 5), jnp.float32)
    bad: list[tuple[Any, type[Exception], str]] = [
        ((jnp.zeros((5, 6), jnp.float32), a, d), ValueError, r"gram has shape \(5, 6\), and rows by rows are \(6, 6\)"),
        ((gram.astype(jnp.bfloat16), a, d), TypeError, "gram is bfloat16: sums need float32 or float64"),
        ((gram, a, d.astype(jnp.float64)), TypeError, "float64 rows need a float64 gram"),
        ((gram, a.astype(jnp.int32), d), TypeError, "activations are int32: pass one of bfloat16"),
        ((gram, a[:, None], d), ValueError, r"\(groups, in\) beside cotangents \(groups, rows, out\)"),
        ((gram, a[:1], d), ValueError, r"have \(groups, positions\) \(1, 1\) and cotangents \(2, 1\)"),
        ((gram, None, d[0]), ValueError, r"explicit rows \(groups, rows, width\), got shape \(3, 5\)"),
    ]
    for operands, kind, message in bad:
        with pytest.raises(kind, match=message):
            gram_accumulate(*operands)
    listed = [operand.tolist() for operand in (gram, a, d)]
    assert gram_accumulate(*listed).shape == (6, 6)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="have 4 entries per activation and those they meet 3"):
        gram_accumulate(gram, a, d, against=(a[:, :3], d))
    layers: list[tuple[Any, str]] = [
        ([], "there are no layers: pass at least one"),
        ([(None, d)], r"explicit rows \(groups, blocks, rows, width\), got shape \(2, 3, 5\)"),
        ([(a, d)], r"activations must be \(groups, blocks, positions, in\) beside cotangents"),
        ([(None, d[:, None]), (None, d[:, None, :1])], r"a layer has \(groups, rows\) \(2, 1\) and the first \(2, 3\)"),
    ]
    for made, message in layers:
        with pytest.raises(ValueError, match=message):
            gram_of_layers(made, np.dtype(np.float32))
    if jax.default_backend() == "cpu":
        with pytest.raises(Unsupported, match="triton cannot run gram_accumulate: the Triton kernel runs on NVIDIA"):
            gram_accumulate(gram, a, d, implementation="triton")
