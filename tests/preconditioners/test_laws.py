"""Laws that every preconditioner keeps: linear, symmetric, positive definite, scan-safe, unmoved by bad refreshes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax import tree
from curvax.estimators import GaussNewtonBartlett, Hutchinson
from curvax.preconditioners import (
    AdaHessianPower,
    EmaDiagonal,
    IdentityPreconditioner,
    Jacobi,
    NystromPreconditioner,
    SophiaFloor,
)
from tests.estimators import standin
from tests.estimators.standin import SIZE, Dense, keys
from tests.oracle.compiling import array, quick_jit

CASES = {
    "identity": IdentityPreconditioner(),
    "jacobi": Jacobi(Hutchinson(2)),
    "jacobi-no-lam": Jacobi(Hutchinson(), add_lam=False),
    "sophia-g": EmaDiagonal(GaussNewtonBartlett(), 0.99, 10, SophiaFloor(), bias_correction=False),
    "sophia-h": EmaDiagonal(Hutchinson(), 0.99, 10, SophiaFloor(0.01)),
    "adahessian": EmaDiagonal(Hutchinson(use_abs=True), 0.999, 1, AdaHessianPower()),
    "damped": EmaDiagonal(Hutchinson(), 0.9),
    "nystrom": NystromPreconditioner(5, 3),
    "nystrom-indefinite": NystromPreconditioner(5, indefinite=True),
}
each = pytest.mark.parametrize("method", CASES.values(), ids=CASES.keys())
MATRICES = {
    "decaying": standin.decaying(SIZE),
    "low rank": standin.low_rank(SIZE, 2),
    "indefinite": standin.indefinite(SIZE),
    "negative": -standin.decaying(SIZE),
    "zero": np.zeros((SIZE, SIZE)),
    "dead coordinates": np.diag(np.concatenate([[2.0, 1.0, -1.0], np.zeros(SIZE - 3)])),
}


def root(matrix: np.ndarray) -> np.ndarray:
    """A factor of the matrix's magnitude, for sampled gradients."""
    values, vectors = np.linalg.eigh(matrix)
    return vectors * np.sqrt(np.abs(values))


def _refresh(method, state, matrix, factor, key, dtype=jnp.float32):
    return method.refresh(state, Dense(matrix, standin.like(dtype), factor), key)


jitted = quick_jit(_refresh, static_argnums=(0, 5))


def refresh(method, state, matrix, seed=0, dtype=jnp.float32):
    wide = tree.accumulation_dtype(dtype)
    return jitted(
        method, state, jnp.asarray(matrix, wide), jnp.asarray(root(matrix), wide), jax.random.key(seed), dtype
    )


def _columns(method, state, lam, dtype):
    _, unravel = tree.ravel(tree.zeros_like(standin.like(dtype)))
    return jax.vmap(lambda v: tree.ravel(method.apply(state, lam, unravel(v)))[0])(jnp.eye(SIZE, dtype=dtype)).T


_jitted_columns = quick_jit(_columns, static_argnums=(0, 3))


def as_matrix(method, state, lam, dtype=jnp.float32) -> np.ndarray:
    """P^-1, by its action on the unit vectors."""
    return np.asarray(_jitted_columns(method, state, jnp.asarray(lam, dtype), dtype), np.float64)


def leaves_bytes(x) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(x)]


@each
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_symmetric_positive_definite_before_and_after_refreshes(x64, method, dtype):
    eps = float(np.finfo(dtype).eps)
    for name, matrix in MATRICES.items():
        state = method.init(standin.like(dtype))
        for count in range(3):
            for lam in (0.0, 1e-3, 10.0):
                p = as_matrix(method, state, lam, dtype)
                assert np.all(np.isfinite(p)), (name, count, lam)
                np.testing.assert_allclose(p, p.T, rtol=1e-5, atol=20 * eps * np.abs(p).max())
                assert np.linalg.eigvalsh((p + p.T) / 2)[0] > 0, (name, count, lam)
            state = refresh(method, state, matrix, count, dtype)
        assert state.rejected == 0


@each
def test_linear_in_v_and_zero_gives_zero(method):
    apply = quick_jit(method.apply)
    zero = tree.zeros_like(standin.like())
    _, unravel = tree.ravel(zero)
    a, b = (unravel(array(np.random.default_rng(s).normal(size=SIZE), jnp.float32)) for s in (0, 1))
    for matrix in (MATRICES["zero"], MATRICES["dead coordinates"]):
        state = refresh(method, method.init(standin.like()), matrix)
        for x in jax.tree.leaves(apply(state, 0.0, zero)):
            assert np.all(x == 0)
        mixed = apply(state, 0.0, jax.tree.map(lambda x, y: 2 * x - 3 * y, a, b))
        parts = (apply(state, 0.0, x) for x in (a, b))
        expected = jax.tree.map(lambda x, y: 2 * x - 3 * y, *parts)
        for x, y in zip(jax.tree.leaves(mixed), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6 * float(jnp.max(jnp.abs(y))))


@each
def test_no_curvature_and_no_damping_leave_v_alone(method):
    for state in (method.init(standin.like()), refresh(method, method.init(standin.like()), MATRICES["zero"])):
        np.testing.assert_array_equal(as_matrix(method, state, 0.0), np.eye(SIZE))


@pytest.mark.parametrize("method", list(CASES.values())[1:], ids=list(CASES)[1:])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_refresh_keeps_the_state_and_is_counted(method, bad):
    good = refresh(method, method.init(standin.like()), MATRICES["decaying"])
    broken = np.array(MATRICES["decaying"])
    broken[-1, -1] = bad  # in one leaf only
    factor = np.array(root(MATRICES["decaying"]))
    factor[-1, -1] = bad
    arrays = jnp.asarray(broken, jnp.float32), jnp.asarray(factor, jnp.float32)
    for start in (method.init(standin.like()), good):
        state = start
        for i in range(2):
            state = jitted(method, state, *arrays, jax.random.key(i))
        assert state.rejected == 2
        assert leaves_bytes(state)[:-1] == leaves_bytes(start)[:-1]
        assert np.all(np.isfinite(as_matrix(method, state, 0.1)))
    after = refresh(method, state, MATRICES["decaying"], 5)
    clean = refresh(method, good, MATRICES["decaying"], 5)
    assert after.rejected == 2 and leaves_bytes(after)[:-1] == leaves_bytes(clean)[:-1]


@each
def test_refreshes_scan(method):
    matrix, factor = (jnp.asarray(a, jnp.float32) for a in (MATRICES["decaying"], root(MATRICES["decaying"])))
    start = method.init(standin.like(jnp.bfloat16))

    @quick_jit
    def scanned(state):
        def step(state, key):
            state = _refresh(method, state, matrix, factor, key, jnp.bfloat16)
            return state, method.apply(state, jnp.float32(0.1), tree.zeros_like(standin.like()))["s"]

        return jax.lax.scan(step, state, keys(4))[0]

    end = scanned(start)
    loop = start
    for key in keys(4):
        loop = jitted(method, loop, matrix, factor, key, jnp.bfloat16)
    for a, b, c in zip(*map(jax.tree.leaves, (start, end, loop)), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and b.dtype in (jnp.float32, jnp.int32)
        if not isinstance(method, NystromPreconditioner):  # its basis is free to turn with rounding
            np.testing.assert_allclose(b, c, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(as_matrix(method, end, 0.1), as_matrix(method, loop, 0.1), rtol=1e-3, atol=1e-4)


@each
def test_traced_once(method):
    traces = []

    @quick_jit
    def step(state, lam, key):
        traces.append(1)
        state = _refresh(method, state, jnp.eye(SIZE), jnp.eye(SIZE), key)
        return state, method.apply(state, lam, tree.zeros_like(standin.like()))

    state = method.init(standin.like())
    for i in range(3):
        state, _ = step(state, jnp.float32(i), jax.random.key(i))
    assert len(traces) == 1


@each
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_states_are_wide_and_v_keeps_its_dtype(method, dtype):
    state = refresh(method, method.init(standin.like(dtype)), MATRICES["decaying"], dtype=dtype)
    assert {x.dtype for x in jax.tree.leaves(state)} <= {np.dtype("float32"), np.dtype("int32")}
    v = jax.tree.map(lambda x: jnp.ones(x.shape, dtype), standin.like())
    for lam in (0.1, jnp.float32(0.1)):
        out = jax.eval_shape(lambda v, lam=lam: method.apply(state, lam, v), v)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), out) == jax.tree.map(lambda x: (x.shape, x.dtype), v)


@each
@pytest.mark.parametrize("empty", [{}, {"a": jax.ShapeDtypeStruct((0, 3), jnp.bfloat16)}], ids=["none", "zero-size"])
def test_empty_trees(method, empty):
    lin = Dense(jnp.zeros((0, 0)), empty, jnp.zeros((0, 2)))
    state = quick_jit(lambda key: method.refresh(method.init(empty), lin, key))(jax.random.key(0))
    assert state.rejected == 0
    out = quick_jit(lambda state: method.apply(state, 0.1, tree.zeros_like(empty)))(state)
    assert jax.tree.map(jnp.shape, out) == jax.tree.map(lambda x: x.shape, empty)


@each
@pytest.mark.parametrize("scale", [1e-6, 1e6, 1e-22, 1e22])
def test_rescaling_the_loss_rescales_the_answer(method, scale):
    """P^-1 of (c C, c lam) is P^-1 of (C, lam) over c, or the same where P is normalized (identity, Nystrom)."""
    normalized = isinstance(method, IdentityPreconditioner | NystromPreconditioner)
    inverses = []
    for c in (1.0, scale):
        state = method.init(standin.like())
        for seed in range(3):
            state = refresh(method, state, c * MATRICES["decaying"], seed)
        inverses.append(as_matrix(method, state, c * 0.01) * (1 if normalized else c))
    np.testing.assert_allclose(*inverses, rtol=2e-3, atol=1e-4 * np.abs(inverses[0]).max())


@each
def test_needs_and_hashing(method):
    samples = isinstance(getattr(method, "estimator", None), GaussNewtonBartlett)
    assert method.needs_sampling == samples
    assert method.needs_product == (not samples and not isinstance(method, IdentityPreconditioner))
    assert isinstance(hash(method), int) and method.every >= 1
