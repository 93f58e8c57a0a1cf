"""K-FAC and EKFAC as preconditioners: their formulas against dense matrices, cadences, and the laws of all others."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax import tree
from curvax.curvature import GeneralizedGaussNewton, Needs
from curvax.losses import SoftmaxCrossEntropy
from curvax.preconditioners import EKFAC, KFAC, CholeskyInverse, EigenInverse
from curvax.preconditioners._blocks import by_size
from curvax.structure.kronecker import WeightSharing
from tests.oracle.compiling import quick_jit
from tests.structure.kronecker_models import Problem, block_diagonal, kronecker_matrix, normal

EXACT = GeneralizedGaussNewton()
CASES = {
    "eigen": KFAC(EXACT),
    "factored": KFAC(EXACT, inverse=EigenInverse(factored=True)),
    "cholesky": KFAC(EXACT, inverse=CholeskyInverse()),
    "ekfac": EKFAC(EXACT),
}
each = pytest.mark.parametrize("method", CASES.values(), ids=CASES.keys())


def _small(p, x):
    """An embedding, a layer over positions with a bias, a scale."""
    return jnp.mean(jnp.tanh(p["e"][x] @ p["w"] + p["b"]) * p["scale"], axis=1) @ p["v"]


def _rich(p, x):
    """An embedding, a shared layer with a bias, stacked layers, a scale, a depthwise convolution."""
    h = jnp.tanh(p["e"][x] @ p["w"] + p["b"]) * p["scale"]
    h = jax.lax.scan(lambda c, layer: (jnp.tanh(c @ layer), None), h, p["s"])[0]
    h = h + jax.lax.conv_general_dilated(
        h, p["k"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=4
    )
    return jnp.mean(h, axis=1) @ p["v"]


SMALL = {"e": (5, 3), "w": (3, 4), "b": (4,), "scale": (4,), "v": (4, 3)}
RICH = {**SMALL, "s": (2, 4, 4), "k": (3, 1, 4)}


def problem(dtype=jnp.float64, seed=0, rich=False) -> Problem:
    shapes = RICH if rich else SMALL
    params = {k: normal(seed + i, *shape).astype(dtype) for i, (k, shape) in enumerate(shapes.items())}
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 5, (6, 3)), rng.integers(0, 3, 6)
    batch = {"x": jnp.asarray(x, jnp.int32), "y": jnp.asarray(y, jnp.int32)}
    return Problem(_rich if rich else _small, params, batch, SoftmaxCrossEntropy())


def refresher(method, case: Problem):
    """(state, lam) -> state after a refresh on the case's batch, compiled."""

    def refresh(state, params, batch, lam, key):
        there = dataclasses.replace(case, params=params, batch=batch)
        at = there.curvature.linearize(params, there.evaluation, Needs(factors=True))
        return method.refresh(state, at, key, lam)

    compiled = quick_jit(refresh)
    return lambda state, lam=0.0, other=case, seed=0: compiled(
        state,
        other.params,
        other.batch if other is not case else case.batch,
        jnp.asarray(lam, tree.scalar_dtype(case.params)),
        jax.random.key(seed),
    )


def inverse_matrix(method, state, lam, like) -> np.ndarray:
    """P^-1 by its action on unit vectors."""
    _, unravel = tree.ravel(tree.zeros_like(like))
    n, dtype = tree.size(like), tree.scalar_dtype(like)
    on = quick_jit(jax.vmap(lambda v: tree.ravel(method.apply(state, jnp.asarray(lam, dtype), unravel(v)))[0]))
    return np.asarray(on(jnp.eye(n, dtype=dtype)), np.float64).T


def diagonal_matrix(blocks, diagonal, like) -> np.ndarray:
    leaves = [np.zeros(x.shape) for x in jax.tree.leaves(like)]
    for block, d in zip(blocks.diagonal, diagonal, strict=True):
        leaves[block.leaf] = np.asarray(d)
    return np.diag(np.concatenate([x.ravel() for x in leaves]))


@pytest.mark.parametrize(("lam", "sharing"), [(1e-3, WeightSharing.EXPAND), (0.5, WeightSharing.REDUCE)])
def test_eigenvectors_invert_the_damped_product_exactly(x64, lam, sharing):
    case = problem(rich=True)
    method = KFAC(EXACT, sharing)
    blocks = case.blocks
    state = refresher(method, case)(method.init_blocks(blocks))
    sums = case.sums(sharing)
    curvature = kronecker_matrix(blocks, sums.means(), sums.outputs, case.params)
    curvature = curvature + diagonal_matrix(blocks, sums.diagonal, case.params)
    expected = np.linalg.inv(curvature + lam * np.eye(len(curvature)))
    np.testing.assert_allclose(inverse_matrix(method, state, lam, case.params), expected, rtol=1e-7, atol=1e-8 / lam)


@pytest.mark.fast
@pytest.mark.parametrize("lam", [1e-2])
def test_factored_damping_is_the_papers_and_both_forms_agree(x64, lam):
    case = problem()
    blocks, sums = case.blocks, case.sums()
    damped_a, damped_b = [], []
    for a, b in zip(sums.means(), sums.outputs, strict=True):
        a = np.stack([np.diag(x) for x in np.asarray(a)]) if a.ndim == 2 else np.asarray(a)
        b = np.asarray(b)
        pi = np.sqrt((np.trace(a, axis1=1, axis2=2) / a.shape[1]) / (np.trace(b, axis1=1, axis2=2) / b.shape[1]))
        damped_a.append(np.linalg.inv(a + (pi * np.sqrt(lam))[:, None, None] * np.eye(a.shape[1])))
        damped_b.append(np.linalg.inv(b + (np.sqrt(lam) / pi)[:, None, None] * np.eye(b.shape[1])))
    expected = kronecker_matrix(blocks, damped_a, damped_b, case.params)
    scale = np.asarray(sums.diagonal[0])
    rest = diagonal_matrix(blocks, [1 / (scale + lam)], case.params)
    for inverse in (CholeskyInverse(), EigenInverse(factored=True)):
        method = KFAC(EXACT, inverse=inverse)
        state = refresher(method, case)(method.init_blocks(blocks), lam)
        np.testing.assert_allclose(
            inverse_matrix(method, state, lam, case.params), expected + rest, rtol=1e-7, atol=1e-9 / lam
        )


def test_ekfac_is_the_diagonal_in_the_eigenbasis_and_nearer_than_kfac(x64):
    case = problem(rich=True)
    blocks, sums = case.blocks, case.sums()
    method, lam = EKFAC(EXACT), 0.1
    state = refresher(method, case)(method.init_blocks(blocks))
    truth = block_diagonal(case.truth("ce").ggn, blocks, case.params)
    kfac = kronecker_matrix(blocks, sums.means(), sums.outputs, case.params)
    inverse = inverse_matrix(method, state, lam, case.params)
    ekfac = np.linalg.inv(inverse) - lam * np.eye(len(inverse))
    ekfac -= diagonal_matrix(blocks, sums.diagonal, case.params)
    # An orthonormal basis of the whole space, made of the bases of the blocks.
    u = [
        np.eye(b.shape[1])[None] if x is None else np.asarray(x)
        for b, (x, _) in zip(blocks.kronecker, state.bases, strict=True)
    ]
    basis = kronecker_matrix(blocks, u, [np.swapaxes(v, 1, 2) for _, v in state.bases], case.params)
    inside = basis.T @ truth @ basis
    np.testing.assert_allclose(basis.T @ ekfac @ basis, np.diag(np.diag(inside)), atol=1e-8)
    errors = [np.linalg.norm(block_diagonal(x, blocks, case.params) - truth) for x in (ekfac, kfac)]
    assert errors[0] < errors[1]


def test_ekfac_turns_its_average_with_the_basis(x64):
    """Between two bases the average stands for one matrix: its diagonal in the new basis."""
    one, other = problem(seed=0), problem(seed=3)
    method = EKFAC(EXACT, inverse_every=1, decay=0.9)
    blocks, refresh = one.blocks, refresher(method, one)
    first = refresh(method.init_blocks(blocks))
    second = refresh(first, other=other)
    fresh = other.measure(lambda e: _squares(blocks, e, second.bases), EXACT)
    for i, ((u, v), (p, q)) in enumerate(zip(first.bases, second.bases, strict=True)):
        for g in range(v.shape[0]):
            u_g, p_g = (np.eye(blocks.kronecker[i].shape[1]) if x is None else np.asarray(x[g]) for x in (u, p))
            old = np.kron(u_g, v[g]) @ np.diag(np.asarray(first.squares[i][g]).ravel()) @ np.kron(u_g, v[g]).T
            new = np.kron(p_g, q[g])
            carried = np.diag(new.T @ old @ new).reshape(first.squares[i][g].shape)
            np.testing.assert_allclose(second.squares[i][g], 0.9 * carried + 0.1 * fresh[i][g], rtol=1e-8, atol=1e-12)


def _squares(blocks, examples, bases):
    from curvax.structure.kronecker import projected_squares

    return projected_squares(blocks, examples, bases)


@each
def test_averages_are_corrected_for_their_start(x64, method):
    """The first refresh counts in full, the second as a weighted mean."""
    one, other = problem(seed=0), problem(seed=3)
    method = dataclasses.replace(method, decay=0.8, inverse_every=1)
    blocks, refresh = one.blocks, refresher(method, one)
    first = refresh(method.init_blocks(blocks))
    second = refresh(first, other=other)
    a, b = one.sums(method.sharing), other.sums(method.sharing)
    weights = np.array([0.2 * 0.8, 0.2]) / (1 - 0.8**2)
    for k, (x, y) in enumerate(zip(a.outputs, b.outputs, strict=True)):
        np.testing.assert_allclose(first.factors.corrected(0.8).outputs[k], x, rtol=1e-10, atol=1e-14)
        expected = weights[0] * x + weights[1] * y
        np.testing.assert_allclose(second.factors.corrected(0.8).outputs[k], expected, rtol=1e-10, atol=1e-14)


@each
def test_inverses_follow_their_cadence_in_a_scan(method):
    """Factors move in every refresh; inverses in the first and then every third; scan and calls agree."""
    case = problem(jnp.float32)
    method = dataclasses.replace(method, every=2, inverse_every=6)
    refresh, start = refresher(method, case), method.init_blocks(case.blocks)
    others = [problem(jnp.float32, seed) for seed in range(7)]
    states = [start]
    for other in others:
        states.append(refresh(states[-1], 0.1, other))
    held = [s.bases if isinstance(method, EKFAC) else s.inverses for s in states]
    moved = [not _same(a, b) for a, b in itertools.pairwise(held)]
    assert moved == [True, False, False, True, False, False, True]
    assert all(not _same(a.factors, b.factors) for a, b in itertools.pairwise(states))

    def body(state, xs):
        params, batch = xs
        there = dataclasses.replace(case, params=params, batch=batch)
        at = there.curvature.linearize(params, there.evaluation, Needs(factors=True))
        return method.refresh(state, at, jax.random.key(0), jnp.float32(0.1)), None

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *[(o.params, o.batch) for o in others])
    end = quick_jit(lambda s, xs: jax.lax.scan(body, s, xs)[0])(start, stacked)
    assert jax.tree.structure(end) == jax.tree.structure(start)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(end)] == [(x.shape, x.dtype) for x in jax.tree.leaves(start)]
    for got, want in zip(
        jax.tree.leaves(inverse_columns(method, end, case)),
        jax.tree.leaves(inverse_columns(method, states[-1], case)),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-3)


def inverse_columns(method, state, case):
    v = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), case.params)
    return quick_jit(method.apply)(state, jnp.float32(0.1), v)


def _same(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@each
def test_symmetric_positive_definite_and_the_identity_at_first(x64, method):
    case = problem()
    state = method.init_blocks(case.blocks)
    refresh, n = refresher(method, case), tree.size(case.params)
    np.testing.assert_array_equal(inverse_matrix(method, state, 0.0, case.params), np.eye(n))
    dead = dataclasses.replace(case, params=jax.tree.map(jnp.zeros_like, case.params))
    for lam, other in ((0.0, case), (1e-4, case), (0.0, dead), (0.1, dead)):
        after = refresh(state, lam, other)
        p = inverse_matrix(method, after, lam, case.params)
        assert np.all(np.isfinite(p)) and after.rejected == 0
        # Where curvature is zero to rounding and there is no damping, P^-1 has its condition number from rounding.
        np.testing.assert_allclose(p, p.T, rtol=1e-4, atol=1e-4 * np.abs(p).max())
        assert np.linalg.eigvalsh((p + p.T) / 2)[0] > 0


@each
def test_a_bad_refresh_keeps_the_state_and_is_counted(method):
    case = problem(jnp.float32)
    refresh = refresher(method, case)
    bad = dataclasses.replace(case, params={**case.params, "w": case.params["w"].at[0, 0].set(jnp.nan)})
    start = method.init_blocks(case.blocks)
    for state in (start, refresh(start, 0.1)):
        after = refresh(refresh(state, 0.1, bad), 0.1, bad)
        assert after.rejected == 2
        assert _same(dataclasses.replace(after, rejected=state.rejected), state)
    # A first refresh that was refused leaves the inverses due.
    recovered = refresh(refresh(start, 0.1, bad), 0.1)
    assert _same(dataclasses.replace(recovered, rejected=start.rejected), refresh(start, 0.1))


@each
def test_rescaling_the_loss_rescales_the_answer(x64, method):
    """The loss is scaled by weights of a sum, so that one compiled refresh serves all scales."""
    case = dataclasses.replace(problem(), loss=SoftmaxCrossEntropy(reduction="sum"))
    cases = [dataclasses.replace(case, batch={**case.batch, "w": jnp.full((6,), c)}) for c in (1.0, 1e-6, 1e6)]
    refresh, found = refresher(method, cases[0]), []
    for c, other in zip((1.0, 1e-6, 1e6), cases, strict=True):
        state = refresh(refresh(method.init_blocks(case.blocks), 0.01 * c, other), 0.01 * c, other)
        found.append(c * inverse_matrix(method, state, 0.01 * c, case.params))
    for other in found[1:]:
        np.testing.assert_allclose(found[0], other, rtol=1e-6, atol=1e-8 * np.abs(found[0]).max())


@each
def test_bfloat16_keeps_wide_states_and_narrow_vectors(method):
    case = problem(jnp.bfloat16)
    state = refresher(method, case)(method.init_blocks(case.blocks), 0.1)
    assert {x.dtype for x in jax.tree.leaves(state)} <= {np.dtype("float32"), np.dtype("int32")}
    assert state.rejected == 0
    v = jax.tree.map(lambda x: jnp.ones(x.shape, jnp.bfloat16), case.params)
    out = quick_jit(method.apply)(state, 0.1, v)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), out) == jax.tree.map(lambda x: (x.shape, x.dtype), v)
    wide = problem(jnp.float32)
    wide = dataclasses.replace(wide, params=jax.tree.map(lambda x: x.astype(jnp.float32), case.params))
    reference = refresher(method, wide)(method.init_blocks(wide.blocks), 0.1)
    for x, y in zip(reference.factors.outputs, state.factors.outputs, strict=True):
        assert np.linalg.norm(x - y) <= 0.1 * np.linalg.norm(x)


@pytest.mark.fast
def test_settings_are_checked_and_methods_hash():
    for kind in (KFAC, EKFAC):
        assert isinstance(hash(kind()), int) and kind() == kind()
        with pytest.raises(ValueError, match="multiple of every"):
            kind(every=3, inverse_every=10)
        with pytest.raises(ValueError, match="decay"):
            kind(decay=1.0)
        with pytest.raises(ValueError, match=r"init\(params, batch=batch\)"):
            kind().init({"w": jnp.ones((2, 2))})


def test_matrices_of_one_size_are_one_call():
    calls = []

    def double(x):
        calls.append(x.shape)
        return (2 * x, x)

    matrices = [jnp.full((g, n, n), float(i)) for i, (g, n) in enumerate([(1, 3), (2, 2), (3, 3), (1, 2), (1, 4)])]
    found = by_size(double, matrices)
    assert calls == [(4, 3, 3), (3, 2, 2), (1, 4, 4)]
    for matrix, (doubled, same) in zip(matrices, found, strict=True):
        np.testing.assert_array_equal(doubled, 2 * matrix)
        np.testing.assert_array_equal(same, matrix)
