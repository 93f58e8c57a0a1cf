"""One table of matrices over every implementation of the dense factorizations, against float64 NumPy."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from curvax.kernels import Implementation, Request, Unsupported
from curvax.kernels.dense_linalg import EIGH, OPS, cholesky, eigh, native, qr, triangular_solve
from curvax.solvers import Result
from tests.oracle.compiling import array, quick_jit
from tests.oracle.systems import eps, positive

over_implementations = pytest.mark.parametrize("implementation", ["native", "reference"])

# Empty, below and above a vector, a panel, a leaf of divide and conquer, a block of reflectors; several merges.
SIZES = (0, 1, 5, 17, 33, 64, 100, 200)
SHAPES = (
    (0, 3),
    (3, 0),
    (1, 1),
    (1, 7),
    (7, 1),
    (5, 5),
    (31, 33),
    (33, 31),
    (64, 64),
    (100, 17),
    (17, 100),
    (200, 129),
)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).standard_normal(shape)


def orthogonal(n: int) -> np.ndarray:
    return np.linalg.qr(normal(n, n, seed=1))[0]


def with_values(values: np.ndarray) -> np.ndarray:
    q = orthogonal(len(values))
    return q * values @ q.T


def graded(n: int, first: float, last: float) -> np.ndarray:
    """D A D with the entries of D from 10^-first to 10^-last."""
    d = 10.0 ** -np.linspace(first, last, n)
    return d[:, None] * positive((), n, 10.0) * d


# Spectra of every kind: spread, of low rank, clustered, of two values, graded; and matrices that need no rotation, or
# that fall apart.
SYMMETRIC: dict[str, Callable[[int], np.ndarray]] = {
    "normal entries": lambda n: normal(n, n) + normal(n, n).T,
    "covariance of few samples": lambda n: normal(n, max(n // 3, 1)) @ normal(n, max(n // 3, 1)).T,
    "identity": np.eye,
    "zero": lambda n: np.zeros((n, n)),
    "ones": lambda n: np.ones((n, n)),
    "diagonal": lambda n: np.diag(normal(n)),
    "values over twenty orders": lambda n: with_values(10.0 ** -np.linspace(0, 20, n)),
    "a cluster": lambda n: with_values(1 + 1e-9 * np.arange(n) * (np.arange(n) > n // 2)),
    "two values": lambda n: with_values(np.where(np.arange(n) % 2, 1.0, -1.0)),
    "second difference": lambda n: 2 * np.eye(n) - np.eye(n, k=1) - np.eye(n, k=-1),
    "Wilkinson's": lambda n: np.diag(np.abs(np.arange(n) - (n - 1) / 2)) + np.eye(n, k=1) + np.eye(n, k=-1),
    "equal blocks": lambda n: np.kron(np.eye(-(-n // 4)), np.ones((4, 4)))[:n, :n],
    "rows over eight orders": lambda n: graded(n, 0, 8),
    "rows over eight orders, rising": lambda n: graded(n, 8, 0),
}  # fmt: skip


@partial(quick_jit, static_argnames=("op", "implementation", "transpose"))
def compiled(op: str, *operands: jax.Array, implementation: Implementation, transpose: bool = False) -> Any:
    if op == "triangular_solve":
        return triangular_solve(*operands, transpose=transpose, implementation=implementation)
    return {"cholesky": cholesky, "eigh": eigh, "qr": qr}[op](*operands, implementation=implementation)


def call(op: str, *operands: Any, implementation: Implementation, dtype: Any, **options: Any) -> Any:
    arrays = [array(x, dtype) for x in operands]
    if implementation == "native" and native.cannot(Request.of(*arrays)) is not None:
        pytest.skip("no native module")
    found = compiled(op, *arrays, implementation=implementation, **options)
    assert all(x.dtype in (dtype, jnp.int32) for x in jax.tree.leaves(found))
    return jax.tree.map(lambda x: np.asarray(x, np.float64 if x.dtype == dtype else x.dtype), found)


def roundings(n: int, dtype: Any) -> float:
    """What a backward stable factorization of size n may be off by, relative to the norm."""
    return (20 + 2 * n) * eps(dtype)


def check_pairs(matrix: np.ndarray, values: np.ndarray, vectors: np.ndarray, dtype: Any) -> None:
    """A pair is one of a nearby matrix, vectors are orthonormal, and values are NumPy's."""
    n = len(matrix)
    want = np.linalg.eigvalsh(matrix)
    bound = roundings(n, dtype) * max(np.max(np.abs(want), initial=0), np.finfo(np.float64).tiny)
    np.testing.assert_allclose(values, want, rtol=0, atol=bound)
    assert np.all(np.diff(values) >= 0)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(n), rtol=0, atol=roundings(n, dtype))
    np.testing.assert_allclose(matrix @ vectors, vectors * values, rtol=0, atol=bound)


@over_implementations
class TestValues:
    @pytest.mark.parametrize("kind", SYMMETRIC)
    def test_eigenpairs(self, kind: str, implementation: Implementation, dtype: Any) -> None:
        for n in SIZES if implementation == "native" else (0, 1, 5, 33):
            matrix = np.asarray(jnp.asarray(SYMMETRIC[kind](n), dtype), np.float64)
            matrix = np.tril(matrix) + np.tril(matrix, -1).T
            found = call("eigh", matrix, implementation=implementation, dtype=dtype)
            assert found.result == Result.CONVERGED
            check_pairs(matrix, found.values, found.vectors, dtype)

    @pytest.mark.fast
    @pytest.mark.parametrize("n", SIZES)
    def test_cholesky_factors(self, n: int, implementation: Implementation, dtype: Any) -> None:
        matrices = positive((2,), n, 100.0)
        found = call("cholesky", matrices, implementation=implementation, dtype=dtype)
        assert found.result.tolist() == [Result.CONVERGED] * 2
        want = np.linalg.cholesky(np.asarray(jnp.asarray(matrices, dtype), np.float64))
        np.testing.assert_allclose(found.lower, want, rtol=0, atol=100 * roundings(n, dtype))
        np.testing.assert_array_equal(np.triu(found.lower, 1), 0)

    @pytest.mark.parametrize("transpose", [False, True])
    @pytest.mark.parametrize(("n", "columns"), [(0, 2), (1, 1), (5, 0), (17, 3), (200, 7)])
    def test_triangular_solutions(
        self, n: int, columns: int, transpose: bool, implementation: Implementation, dtype: Any
    ) -> None:
        lower = np.linalg.cholesky(positive((2,), n, 100.0))
        rhs = normal(2, n, columns)
        # What stands above the diagonal is nobody's business.
        spoilt = lower + np.triu(np.full((n, n), np.nan), 1)
        found = call("triangular_solve", spoilt, rhs, implementation=implementation, dtype=dtype, transpose=transpose)
        matrix = np.swapaxes(lower, -1, -2) if transpose else lower
        np.testing.assert_allclose(found, np.linalg.solve(matrix, rhs), rtol=0, atol=100 * roundings(n, dtype))

    def test_the_inverse_of_a_triangle(self, implementation: Implementation, dtype: Any) -> None:
        """The identity's leading zeros are skipped, whole columns of zeros as well."""
        lower, rhs = np.linalg.cholesky(positive((), 70, 10.0)), np.eye(70)
        rhs[:, 40:] = 0
        found = call("triangular_solve", lower, rhs, implementation=implementation, dtype=dtype)
        np.testing.assert_allclose(found, np.linalg.solve(lower, rhs), rtol=0, atol=roundings(70, dtype))

    @pytest.mark.parametrize("shape", SHAPES)
    def test_qr_factors(self, shape: tuple[int, int], implementation: Implementation, dtype: Any) -> None:
        m, n = shape
        k = min(shape)
        plain = normal(m, n)
        matrices = {
            "normal entries": plain,
            "zero": 0 * plain,
            "equal columns": np.broadcast_to(plain[:, :1], shape) if n else plain,
            "of rank one": plain[:, :1] * plain[:1] if n and m else plain,
            "columns over twenty orders": plain * 10.0 ** -np.linspace(0, 20, n),
        }
        for kind, matrix in matrices.items():
            matrix = np.asarray(jnp.asarray(matrix, dtype), np.float64)
            found = call("qr", matrix, implementation=implementation, dtype=dtype)
            assert (found.result, found.q.shape, found.r.shape) == (Result.CONVERGED, (m, k), (k, n))
            bound = roundings(max(shape), dtype)
            np.testing.assert_allclose(found.q.T @ found.q, np.eye(k), rtol=0, atol=bound, err_msg=kind)
            np.testing.assert_array_equal(np.tril(found.r, -1), 0)
            sizes = np.linalg.norm(matrix, axis=0)
            assert np.all(np.abs(found.q @ found.r - matrix) <= bound * sizes + np.finfo(dtype).tiny), kind

    def test_scale_changes_nothing_else(self, implementation: Implementation) -> None:
        """By powers of two, to the ends of the range."""
        matrix = positive((), 40, 30.0)
        plain = call("eigh", matrix, implementation=implementation, dtype=np.float32)
        for power in (-100, 100):
            scaled = call("eigh", matrix * 2.0**power, implementation=implementation, dtype=np.float32)
            np.testing.assert_allclose(scaled.values / 2.0**power, plain.values, rtol=1e-5, atol=1e-6)
            check_pairs(np.asarray(matrix, np.float32) * 2.0**power, scaled.values, scaled.vectors, np.float32)
            factors = call("qr", matrix * 2.0**power, implementation=implementation, dtype=np.float32)
            np.testing.assert_allclose(factors.q @ factors.r / 2.0**power, matrix, atol=1e-5)


@over_implementations
def test_outcomes(implementation: Implementation, dtype: Any) -> None:
    """Matrices of every kind in one stack: none touches another."""
    n = 37
    good = positive((), n, 50.0)
    stack = np.stack([good, -good, good, good, np.zeros((n, n)), good])
    stack[2, n // 2, n // 3] = stack[2, n // 3, n // 2] = np.nan
    stack[3, n - 1, n - 1] = np.inf
    converged, bad, not_positive = Result.CONVERGED, Result.NON_FINITE, Result.NOT_POSITIVE_DEFINITE
    results = {
        "eigh": [converged, converged, bad, bad, converged, converged],
        "qr": [converged, converged, bad, bad, converged, converged],
        "cholesky": [converged, not_positive, bad, bad, not_positive, converged],
    }
    for op, kinds in results.items():
        found = call(op, stack, implementation=implementation, dtype=dtype)
        assert [Result(int(r)) for r in found.result] == kinds, op
        for leaf in jax.tree.leaves(found)[:-1]:
            for entry, kind in zip(leaf, kinds, strict=True):
                assert np.all(np.isnan(entry)) if kind != converged else np.all(np.isfinite(entry)), op
            np.testing.assert_array_equal(leaf[0], leaf[5])


@over_implementations
def test_vmap_and_scan(implementation: Implementation) -> None:
    """Over axes in front and behind, nested, and one matrix after the other: what a stack gives."""
    stack = positive((2, 3), 9, 20.0)
    want = call("eigh", stack, implementation=implementation, dtype=np.float32)
    one = partial(eigh, implementation=implementation)
    x = array(stack, jnp.float32)
    found = jax.jit(jax.vmap(jax.vmap(one)))(x)
    np.testing.assert_allclose(found.values, want.values, rtol=1e-5)
    found = jax.jit(jax.vmap(one, in_axes=2))(jnp.moveaxis(x, 1, 2))
    np.testing.assert_allclose(found.values, want.values.swapaxes(0, 1), rtol=1e-5)
    _, found = jax.lax.scan(lambda carry, a: (carry, one(a)), (), x)
    np.testing.assert_allclose(found.values, want.values, rtol=1e-5)
    lower = jnp.linalg.cholesky(x)
    solve = partial(triangular_solve, implementation=implementation)
    rhs = array(normal(9, 4), jnp.float32)
    found = jax.vmap(jax.vmap(solve, in_axes=(0, None)), in_axes=(0, None))(lower, rhs)
    np.testing.assert_allclose(found, solve(lower, rhs), rtol=1e-5)
    np.testing.assert_allclose(lower @ found, np.broadcast_to(rhs, found.shape), atol=1e-4)


@over_implementations
def test_inside_shard_map(implementation: Implementation) -> None:
    """Each device on its own matrices, with the check of what varies over the mesh."""
    mesh = Mesh(np.array(jax.devices()[:1]), ("d",))
    x = array(positive((2,), 12, 20.0), jnp.float32)

    def local(a: jax.Array) -> Any:
        factors = cholesky(a, implementation=implementation)
        inverse = triangular_solve(factors.lower, jnp.eye(12), implementation=implementation)
        return eigh(a, implementation=implementation), qr(a, implementation=implementation), factors, inverse

    spec = PartitionSpec("d")
    found = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec))(x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, local(x))


@over_implementations
def test_derivatives(implementation: Implementation, x64: None) -> None:
    """JAX's own, forward and backward, of one matrix and of stacks."""
    stack = positive((2,), 4, 9.0)

    def ours(a: jax.Array) -> jax.Array:
        symmetric = (a + a.mT) / 2
        pairs, factors = eigh(symmetric, implementation=implementation), qr(a, implementation=implementation)
        lower = cholesky(symmetric, implementation=implementation).lower
        solved = triangular_solve(lower, a, implementation=implementation)
        projector = pairs.vectors[..., :1] @ pairs.vectors[..., :1].mT
        return jnp.sum(pairs.values**2) + jnp.sum(projector**3) + jnp.sum(factors.r**2 * 0.5) + jnp.sum(jnp.sin(solved))

    def plain(a: jax.Array) -> jax.Array:
        symmetric = (a + a.mT) / 2
        values, vectors = jnp.linalg.eigh(symmetric)
        lower = jnp.linalg.cholesky(symmetric)
        solved = jax.lax.linalg.triangular_solve(lower, a, left_side=True, lower=True)
        projector = vectors[..., :1] @ vectors[..., :1].mT
        r = jnp.linalg.qr(a)[1]
        return jnp.sum(values**2) + jnp.sum(projector**3) + jnp.sum(r**2 * 0.5) + jnp.sum(jnp.sin(solved))

    def derivatives(function: Callable[[jax.Array], jax.Array]) -> Callable[..., Any]:
        return quick_jit(lambda x, along: (jax.grad(function)(x), jax.jvp(function, (x,), (along,))[1]))

    for x in (jnp.asarray(stack[0]), jnp.asarray(stack)):
        along = jnp.asarray(normal(*x.shape))
        for got, expected in zip(derivatives(ours)(x, along), derivatives(plain)(x, along), strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-10)


def test_threads_do_not_matter() -> None:
    """Bit by bit, on matrices large enough to be shared and on stacks."""
    if native.cannot(Request.of(jnp.zeros((1, 1)))) is not None:
        pytest.skip("no native module")
    for shape in ((1, 300, 300), (1, 1700, 60), (7, 40, 40)):
        x = array(normal(*shape), jnp.float32)
        square = x[:, : shape[2]] + x[:, : shape[2]].mT
        for run, operand in ((native.eigh, square), (native.qr, x), (native.cholesky, square @ square.mT)):
            one, *others = (jax.device_get(run(operand, threads=threads)) for threads in (1, 2, 5))
            for other in others:
                jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_matrix_beyond_the_caches() -> None:
    """Large enough for the products with the matrix itself to be shared among threads."""
    if native.cannot(Request.of(jnp.zeros((1, 1)))) is not None:
        pytest.skip("no native module")
    n = 1600
    half = array(normal(n, n), jnp.float32)
    x = half + half.T
    one, many = native.eigh(x, threads=1), native.eigh(x, threads=3)
    np.testing.assert_array_equal(one.vectors, many.vectors)
    v = np.asarray(one.vectors)
    assert np.max(np.abs(v.T @ v - np.eye(n))) < 100 * eps(np.float32)
    assert np.max(np.abs(np.asarray(x) @ v - v * np.asarray(one.values))) < 1e-4 * float(one.values[-1])


SEVERAL_DEVICES = """
import re
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from curvax.kernels.dense_linalg import eigh
mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
half = np.random.default_rng(0).standard_normal((8, 32, 32)).astype(np.float32)
stack = half + half.swapaxes(1, 2)
for spec in (P("d"), P(None, "d"), P()):
    x = jax.device_put(stack, NamedSharding(mesh, spec))
    compiled = jax.jit(eigh).lower(x).compile()
    found = compiled(x)
    np.testing.assert_allclose(found.values, np.linalg.eigvalsh(stack.astype(np.float64)), atol=1e-4)
    calls = re.findall(r"f32\\[(\\d+),32\\]\\S*, f32\\[\\d+,32,32\\].* custom-call", compiled.as_text())
    print(spec, calls)
    assert calls == (["2"] if spec == P("d") else ["8"]), calls
"""


def test_several_devices() -> None:
    """Each takes its part of the leading axes; other axes are gathered."""
    if native.cannot(Request.of(jnp.zeros((1, 1)))) is not None:
        pytest.skip("no native module")
    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run([sys.executable, "-c", SEVERAL_DEVICES], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout


def test_complex_matrices_take_the_reference(x64: None) -> None:
    rng = np.random.default_rng(0)
    tall = rng.standard_normal((2, 3, 6, 4)) + 1j * rng.standard_normal((2, 3, 6, 4))
    q, r, result = jax.tree.leaves(jax.jit(qr)(tall))
    np.testing.assert_allclose(np.asarray(q) @ np.asarray(r), tall, rtol=0, atol=1e-13)
    assert np.all(np.asarray(result) == int(Result.CONVERGED))
    hermitian = np.swapaxes(tall.conj(), -1, -2) @ tall
    pairs = jax.vmap(eigh)(jnp.asarray(hermitian))
    assert pairs.values.dtype == jnp.float64
    np.testing.assert_allclose(pairs.values, np.linalg.eigvalsh(hermitian), rtol=1e-12)
    values, vectors = np.asarray(pairs.values), np.asarray(pairs.vectors)
    np.testing.assert_allclose(hermitian @ vectors, vectors * values[..., None, :], atol=1e-11)
    with pytest.raises(TypeError, match="matrices has dtype complex128: convert it to a floating dtype"):
        cholesky(jnp.asarray(hermitian))


class TestRefusals:
    def test_shapes_and_dtypes(self) -> None:
        for function in (cholesky, eigh):
            with pytest.raises(TypeError, match=r"matrices must be \(\.\.\., n, n\), got \(3, 4\)"):
                function(jnp.ones((3, 4)))
            with pytest.raises(TypeError, match="matrices has dtype int32: convert it to a floating "):
                function(jnp.ones((3, 3), jnp.int32))
        with pytest.raises(TypeError, match=r"qr: matrices must be \(\.\.\., m, n\), got \(3,\)"):
            qr(jnp.ones(3))
        with pytest.raises(TypeError, match=r"lower must be \(\.\.\., n, n\) and rhs \(\.\.\., n, c\)"):
            triangular_solve(jnp.eye(3), jnp.ones((4, 1)))
        with pytest.raises(TypeError, match="the leading axes do not broadcast"):
            triangular_solve(jnp.ones((2, 3, 3)), jnp.ones((3, 3, 1)))

    def test_implementations(self) -> None:
        with pytest.raises(Unsupported, match="eigh has no pallas implementation"):
            eigh(jnp.eye(3), implementation="pallas")
        gpu = Request("gpu", 1, (np.dtype(np.float32),), ((3, 3),))
        for op in OPS:
            variant = op.variant("native")
            assert variant is not None and variant.cannot(gpu) == "the C++ handlers run on cpu, and this is gpu"

    def test_narrow_and_list_operands(self) -> None:
        narrow = jnp.asarray(positive((), 6, 3.0), jnp.bfloat16)
        found = eigh(narrow)
        assert found.vectors.dtype == jnp.float32
        np.testing.assert_allclose(found.values, np.linalg.eigvalsh(np.asarray(narrow, np.float64)), rtol=1e-5)
        assert cholesky([[4.0, 0.0], [0.0, 9.0]]).lower.tolist() == [[2.0, 0.0], [0.0, 3.0]]  # type: ignore[arg-type]


def test_the_plan_of_each_op() -> None:
    """On the CPU the native form, since it is the fastest there; it names itself in the report."""
    if native.cannot(Request.of(jnp.zeros((1, 1)))) is not None:
        pytest.skip("no native module")
    assert [v.name for v in EIGH.variants] == ["native", "reference"]
