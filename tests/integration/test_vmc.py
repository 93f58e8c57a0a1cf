"""Variational Monte Carlo: directions against the dense covariances of log-derivatives and local energies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from jax.flatten_util import ravel_pytree

import curvax
from curvax.curvature import TrainablePartition
from curvax.losses import BatchFault, SquaredError, VariationalEnergy
from curvax.output_space import GeneralizedGaussNewton
from tests.oracle.compiling import quick_jit

pytestmark = pytest.mark.usefixtures("x64", "promotion")
SAMPLES, SITES, HIDDEN, LAM = 9, 3, 4, 1e-2


@pytest.fixture
def promotion() -> Iterator[None]:
    """Models here mix real and complex numbers as their users do; curvax itself must not need it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


class Ansatz(NamedTuple):
    log_psi: Callable[[Any, jax.Array], jax.Array]
    params: Callable[[], dict[str, jax.Array]]


def _real(seed: int, *shape: int) -> jax.Array:
    return random.normal(random.key(seed), shape) / 2


def _complex(seed: int, *shape: int) -> jax.Array:
    return jax.lax.complex(_real(seed, *shape), _real(seed + 100, *shape))


def _rbm(p: Any, x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.log(jnp.cosh(x @ p["w"] + p["b"])), -1) + x @ p["a"]


def _assembled(p: Any, x: jax.Array) -> jax.Array:
    h = jnp.tanh(x @ p["v"])
    return jnp.sum(jnp.log(jnp.cosh(h @ (p["re"] + 1j * p["im"]) + p["b"])), -1)


def _not_holomorphic(p: Any, x: jax.Array) -> jax.Array:
    z = x @ p["w"]
    return jnp.sum(0.1 * jnp.abs(z) ** 2 + (0.3 + 0.1j) * jnp.conj(z), -1)


def _slogdet(p: Any, x: jax.Array) -> jax.Array:
    orbitals = jnp.tanh(jnp.einsum("bi,ijk->bjk", x, p["orbitals"]) + p["shift"])
    return jnp.linalg.slogdet(orbitals)[1]


ANSATZE = {
    "real determinant": Ansatz(_slogdet, lambda: {"orbitals": _real(1, SITES, 2, 2), "shift": 2 * jnp.eye(2)}),
    "complex holomorphic": Ansatz(
        _rbm, lambda: {"w": _complex(1, SITES, HIDDEN), "b": _complex(2, HIDDEN), "a": _complex(3, SITES)}
    ),
    "complex, not holomorphic": Ansatz(_not_holomorphic, lambda: {"w": _complex(1, SITES, HIDDEN)}),
    "real parameters, complex inside": Ansatz(
        _assembled,
        lambda: {"v": _real(1, SITES, HIDDEN), "re": _real(2, HIDDEN, 3), "im": _real(3, HIDDEN, 3), "b": _real(4, 3)},
    ),
}
_GENERATOR = np.random.default_rng(7)
ENERGIES = _GENERATOR.normal(size=SAMPLES) + 2j * _GENERATOR.normal(size=SAMPLES)
WEIGHTS = np.asarray([1.0, 0.5, 0.0, 2.0, 1.0, 0.7, 0.2, 1.0, 0.3])


def _samples() -> jax.Array:
    return _real(9, SAMPLES, SITES)


def _parts(tree: Any) -> np.ndarray:
    """All real numbers of a tree, those of complex leaves in two halves."""
    leaves: list[Any] = list(map(np.asarray, jax.tree.leaves(tree)))
    flat = [np.stack([x.real, x.imag]).ravel() if np.iscomplexobj(x) else x.ravel() for x in leaves]
    return np.concatenate(flat)


def _rows(ansatz: Ansatz, params: Any, x: jax.Array) -> np.ndarray:
    """d Re log psi and d Im log psi in all real numbers of the parameters: (samples, 2, n)."""
    leaves, structure = jax.tree.flatten(params)
    parts = [jnp.stack([leaf.real, leaf.imag]) if jnp.iscomplexobj(leaf) else leaf for leaf in leaves]
    flat, unravel = ravel_pytree(parts)

    def outputs(q: jax.Array) -> jax.Array:
        own = [p[0] + 1j * p[1] if jnp.iscomplexobj(leaf) else p for p, leaf in zip(unravel(q), leaves, strict=True)]
        f = ansatz.log_psi(jax.tree.unflatten(structure, own), x)
        return jnp.stack([f.real, jnp.imag(f)], -1)

    return np.asarray(quick_jit(jax.jacfwd(outputs))(flat))


def dense_direction(rows: np.ndarray, energies: Any, weights: Any) -> np.ndarray:
    """(S + lam I)^-1 F from explicit rows."""
    counted = weights > 0
    rows, energies, w = rows[counted], energies[counted], weights[counted] / weights.sum()
    residuals = np.stack([energies.real, energies.imag], -1)
    rows, residuals = rows - np.tensordot(w, rows, 1), residuals - w @ residuals
    matrix = np.einsum("b,bkm,bkn->mn", w, rows, rows)
    return np.linalg.solve(matrix + LAM * np.eye(len(matrix)), np.einsum("b,bkm,bk->m", w, rows, residuals))


def _direction(method: curvax.Method, params: Any, batch: Any) -> tuple[np.ndarray, Any, dict[str, Any]]:
    state = method.init(params, batch=batch)
    new, _, info = quick_jit(method.step)(params, batch, state, random.key(0))
    return _parts(jax.tree.map(jnp.subtract, params, new)), new, info


SOLVERS: dict[str, dict[str, Any]] = {
    "planned": {},
    "in pieces": {"microbatch_size": 4},
    "spring": {"momentum": 0.9},
}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", ANSATZE)
def test_direction_is_the_dense_one(name: str, solver: str) -> None:
    ansatz, x = ANSATZE[name], _samples()
    params = ansatz.params()
    method = curvax.vmc(
        predict_fn=ansatz.log_psi, weight_key="w", clip=None, lam0=LAM, learning_rate=1.0, **SOLVERS[solver]
    )
    got, new, info = _direction(method, params, {"x": x, "y": ENERGIES, "w": WEIGHTS})
    rows = _rows(ansatz, params, x)
    np.testing.assert_allclose(got, dense_direction(rows, ENERGIES, WEIGHTS), rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(info["loss"], np.sum(WEIGHTS * ENERGIES.real) / WEIGHTS.sum(), rtol=1e-12)
    assert jax.tree.map(lambda p: p.dtype, new) == jax.tree.map(lambda p: p.dtype, params)


def test_a_holomorphic_direction_is_the_complex_one() -> None:
    """(O^H O + lam I) s = O^H E in complex numbers, rows and energies centered."""
    ansatz, x = ANSATZE["complex holomorphic"], _samples()
    params = ansatz.params()
    flat, unravel = ravel_pytree(params)
    rows = np.asarray(quick_jit(jax.jacrev(lambda q: ansatz.log_psi(unravel(q), x), holomorphic=True))(flat))
    rows, energies = rows - rows.mean(0), np.asarray(ENERGIES - ENERGIES.mean())
    matrix = rows.conj().T @ rows / SAMPLES + LAM * np.eye(len(flat))
    direction = np.linalg.solve(matrix, rows.conj().T @ energies / SAMPLES)
    method = curvax.vmc(predict_fn=ansatz.log_psi, clip=None, lam0=LAM, learning_rate=1.0)
    got, _, _ = _direction(method, params, {"x": x, "y": ENERGIES})
    np.testing.assert_allclose(got, _parts(unravel(jnp.asarray(direction))), rtol=1e-8, atol=1e-10)


def test_what_has_no_weight_is_not_there() -> None:
    """A singular determinant, an infinite energy and a NaN change no bit of a direction that does not count them."""
    ansatz, x = ANSATZE["real determinant"], _samples()
    params = {**ansatz.params(), "shift": jnp.zeros((2, 2))}  # at x = 0 all orbitals are zero
    method = curvax.vmc(predict_fn=ansatz.log_psi, weight_key="w", lam0=LAM, learning_rate=1.0)
    step = jax.jit(method.step)
    batch = {"x": x, "y": ENERGIES.real, "w": WEIGHTS}
    masked, _, info = step(params, batch, method.init(params))
    energies = np.where(WEIGHTS == 0, np.inf, ENERGIES.real)
    for singular in (0.0, jnp.nan):
        broken = {**batch, "x": x.at[2].set(singular), "y": energies}
        got, _, seen = step(params, broken, method.init(params))
        jax.tree.map(np.testing.assert_array_equal, got, masked)
        assert seen["accepted"] and seen["loss"] == info["loss"] and np.isfinite(seen["loss"])
    assert ansatz.log_psi(params, x.at[2].set(0.0))[2] == -jnp.inf


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_batch_in_which_no_sample_counts_is_a_fault(momentum: float) -> None:
    """No energy can be a mean over nothing: the step is not taken, under jit it says why, and the next one is sound."""
    ansatz, x = ANSATZE["complex holomorphic"], _samples()
    params = ansatz.params()
    method = curvax.vmc(predict_fn=ansatz.log_psi, weight_key="w", lam0=LAM, momentum=momentum)
    step, batch = jax.jit(method.step), {"x": x, "y": ENERGIES, "w": WEIGHTS}
    new, state, info = step(params, {**batch, "w": np.zeros(SAMPLES)}, method.init(params))
    assert int(info["batch_fault"]) == BatchFault.NO_SAMPLES and not info["accepted"]
    assert "weight zero" in BatchFault(int(info["batch_fault"])).describe()
    jax.tree.map(np.testing.assert_array_equal, new, params)
    after, _, info = step(new, batch, state)
    expected, _, _ = step(params, batch, method.init(params))
    assert int(info["batch_fault"]) == BatchFault.NONE and info["accepted"]
    jax.tree.map(np.testing.assert_array_equal, after, expected)
    with pytest.raises(ValueError, match="weight zero"):
        VariationalEnergy().check_values(jnp.zeros((SAMPLES, 2)), np.zeros((SAMPLES, 2)), np.zeros(SAMPLES))


def test_outlying_energies_are_clipped_as_in_the_paper() -> None:
    energies = np.asarray([0.0, 1.0, -1.0, 2.0, -2.0, 1e6])
    median = np.median(energies)
    spread = np.abs(energies - median).mean()
    clipped = np.clip(energies, median - 2 * spread, median + 2 * spread)
    loss, outputs, weights = VariationalEnergy(clip=2.0), jnp.zeros(6), jnp.full(6, 1 / 6)
    got = loss.gradient(outputs, jnp.asarray(energies), weights)
    np.testing.assert_allclose(got, (clipped - clipped.mean()) / 6, rtol=1e-12)
    np.testing.assert_allclose(loss.value(outputs, jnp.asarray(energies), weights), energies.mean(), rtol=1e-12)


def test_kronecker_factors_are_those_without_centering() -> None:
    ansatz, x = ANSATZE["real parameters, complex inside"], _samples()
    params = ansatz.params()
    options: dict[str, Any] = {
        "predict_fn": ansatz.log_psi, "fisher": GeneralizedGaussNewton(), "lam_policy": "const", "lam0": 0.1,
        "learning_rate": 1.0, "beta1": 0.0,
    }  # fmt: skip
    batch = {"x": x, "y": ENERGIES}
    energy = curvax.kfac(loss=VariationalEnergy(clip=None), **options)
    text = energy.plan_for(params, batch).explain()
    assert text.count("Kronecker factors") >= 3 and "explicit" not in text
    # The same factors on the gradient of the centered residuals.
    f = ansatz.log_psi(params, x)
    plain = curvax.kfac(loss=SquaredError(), **options)
    targets = f - (ENERGIES - ENERGIES.mean())
    got, _, _ = _direction(energy, params, batch)
    want, _, _ = _direction(plain, params, {"x": x, "y": targets})
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["egn", "sgn", "newton_cg", "sophia_g", "adahessian"])
def test_general_methods_take_complex_parameters(name: str) -> None:
    """|f - y|^2 falls, and the parameters stay complex."""
    x = _samples()
    y = jnp.exp(1j * x.sum(-1, keepdims=True))

    def predict(p: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ p["w"]) @ p["v"]

    def loss_fn(p: Any, batch: Any) -> jax.Array:
        return 0.5 * jnp.mean(jnp.sum(jnp.abs(predict(p, batch["x"]) - batch["y"]) ** 2, -1))

    params, batch = {"w": _complex(1, SITES, HIDDEN), "v": _complex(2, HIDDEN, 1)}, {"x": x, "y": y}
    second = name in ("newton_cg", "adahessian")
    model: dict[str, Any] = {"loss_fn": loss_fn} if second else {"predict_fn": predict}
    if name in ("egn", "sgn", "sophia_g"):
        model["loss"] = SquaredError()
    method = curvax.make(name, **model)
    step, state = quick_jit(method.step), method.init(params)
    first = loss_fn(params, batch)
    for _ in range(5):
        params, state, info = step(params, batch, state, random.key(0))
    assert loss_fn(params, batch) < first
    assert all(jnp.iscomplexobj(leaf) for leaf in jax.tree.leaves(params))
    assert np.isfinite(info["loss"])


def test_a_partition_joins_what_it_split() -> None:
    params = {"z": _complex(1, 2), "n": jnp.arange(3), "x": _real(2, 2)}
    trainable, frozen = TrainablePartition({"z": False, "n": False, "x": True}).split(params)
    assert len(jax.tree.leaves(trainable)) == 2
    merged = TrainablePartition().merge(trainable, frozen)
    jax.tree.map(np.testing.assert_array_equal, merged, params)


def test_misuse_is_one_sentence() -> None:
    log_psi, x = ANSATZE["complex holomorphic"].log_psi, _samples()
    params = ANSATZE["complex holomorphic"].params()
    with pytest.raises(ValueError, match="judges steps by the loss"):
        curvax.egn(predict_fn=log_psi, loss=VariationalEnergy())
    with pytest.raises(ValueError, match="clip is 0"):
        curvax.vmc(predict_fn=log_psi, clip=0)
    method = curvax.vmc(predict_fn=log_psi)
    state = method.init(params)
    with pytest.raises(ValueError, match="the local energies are"):
        method.step(params, {"x": x, "y": ENERGIES[:-1]}, state)
    wide = curvax.vmc(predict_fn=lambda p, x: jnp.stack([log_psi(p, x)] * 3, -1))
    with pytest.raises(ValueError, match="return one real or complex number"):
        wide.step(params, {"x": x, "y": ENERGIES}, wide.init(params))
    with pytest.raises(TypeError, match="complex"):
        other = curvax.sgn_ce(predict_fn=log_psi)
        other.step(params, {"x": x, "y": jnp.zeros(SAMPLES, int)}, other.init(params))
