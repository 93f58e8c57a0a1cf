"""The systems: an ansatz log psi, local energies, and the exact ground-state energy of each."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sampling import LogPsi, Propose, gaussian_moves, spin_flips

Params = Any


@dataclasses.dataclass(frozen=True)
class System:
    """What a run needs. Walkers are (walkers, ...); `walker` draws the first of them."""

    exact: float
    log_psi: LogPsi
    init: Callable[[jax.Array], Params]
    local_energies: Callable[[Params, jax.Array], jax.Array]
    walker: Callable[[jax.Array, int], jax.Array]
    propose: Propose
    tolerance: float
    """How far from the exact energy the ansatz may end, besides statistics."""


def dense(key: jax.Array, n: int, m: int) -> dict[str, jax.Array]:
    return {"w": jax.random.normal(key, (n, m)) / np.sqrt(n), "b": jnp.zeros(m)}


def mlp(layers: list[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
    for layer in layers[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return x @ layers[-1]["w"] + layers[-1]["b"]


def network(key: jax.Array, *widths: int) -> list[dict[str, jax.Array]]:
    keys = jax.random.split(key, len(widths) - 1)
    layers = [dense(k, n, m) for k, (n, m) in zip(keys, itertools.pairwise(widths), strict=True)]
    # The network begins as a small correction to the rest of the ansatz.
    layers[-1]["w"] *= 0.1
    return layers


def continuous(
    log_psi: LogPsi, potential: Callable[[jax.Array], jax.Array]
) -> Callable[[Params, jax.Array], jax.Array]:
    """E(x) = -1/2 (laplacian f + |grad f|^2) + V(x) with f = log psi, for walkers (walkers, electrons, 3)."""

    def one(params: Params, x: jax.Array) -> jax.Array:
        def f(flat: jax.Array) -> jax.Array:
            return log_psi(params, flat.reshape(1, *x.shape))[0]

        flat = x.reshape(-1)
        gradient, hessian = jax.grad(f)(flat), jax.hessian(f)(flat)
        return -0.5 * (jnp.trace(hessian) + gradient @ gradient) + potential(x)

    return jax.vmap(one, (None, 0))


def oscillator() -> System:
    """Three particles in a harmonic trap, with no interaction: 3/2 each."""

    def log_psi(params: Params, x: jax.Array) -> jax.Array:
        squares = jnp.sum(x**2, -1)
        return jnp.sum(-params["a"] * squares + mlp(params["net"], squares[..., None])[..., 0], -1)

    return System(
        exact=4.5,
        log_psi=log_psi,
        init=lambda key: {"a": jnp.asarray(0.3), "net": network(key, 1, 8, 1)},
        local_energies=continuous(log_psi, lambda x: 0.5 * jnp.sum(x**2)),
        walker=lambda key, count: jax.random.normal(key, (count, 3, 3)),
        propose=gaussian_moves,
        tolerance=1e-3,
    )


def atom(charge: int, exact: float, tolerance: float) -> System:
    """An atom: a Slater determinant of neural orbitals per spin, and a Jastrow factor with the electrons' cusp.

    The k-th orbital of electron i is exp(-zeta_k r_i) times a network of its own coordinates and of the mean of the
    others', so that the nodes are not those of independent electrons.
    """
    spins = (charge - charge // 2, charge // 2)

    def features(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        r = jnp.sqrt(jnp.sum(x**2, -1))
        pairs = x[:, :, None] - x[:, None]
        # The distance of an electron to itself, which is not used, must have a derivative.
        apart = jnp.sqrt(jnp.sum(pairs**2, -1) + jnp.eye(charge))
        others = (1 - jnp.eye(charge)) / max(charge - 1, 1)
        mean = jnp.einsum("bij,ij->bi", jnp.exp(-apart), others)
        around = jnp.einsum("bj,ij->bi", jnp.exp(-r), others)
        return r, apart, jnp.stack([jnp.log1p(r), mean, around], -1)

    def log_psi(params: Params, x: jax.Array) -> jax.Array:
        r, apart, seen = features(x)
        networks = jax.nn.tanh(seen @ params["hidden"]["w"] + params["hidden"]["b"]) @ params["orbitals"]
        total, first = jnp.zeros(x.shape[0]), 0
        for count in spins:
            own = slice(first, first + count)
            if count:
                decay = jnp.exp(-params["zeta"][:count] * r[:, own, None])
                # The shapes of hydrogen's: s, then one that changes sign with the distance.
                shape = jnp.stack([jnp.ones_like(r[:, own]), r[:, own] - params["node"]], -1)[..., :count]
                total += jnp.linalg.slogdet(decay * (shape + networks[:, own, :count]))[1]
            first += count
        same = np.equal.outer(np.arange(charge) < spins[0], np.arange(charge) < spins[0])
        cusp = jnp.where(same, 0.25, 0.5) * np.triu(np.ones((charge, charge)), 1)
        jastrow = jnp.sum(cusp * apart / (1 + jax.nn.softplus(params["range"]) * apart), (1, 2))
        return total + jastrow + jnp.sum(mlp(params["correlation"], seen)[..., 0], -1)

    def init(key: jax.Array) -> Params:
        first, second, third = jax.random.split(key, 3)
        return {
            "zeta": jnp.asarray([charge - 0.3 * (charge > 1), charge / 3.0]),
            "node": jnp.asarray(1.0),
            "range": jnp.asarray(0.5),
            "hidden": dense(first, 3, 16),
            "orbitals": 0.1 * jax.random.normal(second, (16, 2)),
            "correlation": network(third, 3, 16, 1),
        }

    def potential(x: jax.Array) -> jax.Array:
        r = jnp.sqrt(jnp.sum(x**2, -1))
        upper = np.triu_indices(charge, 1)
        apart = jnp.sqrt(jnp.sum((x[upper[0]] - x[upper[1]]) ** 2, -1))
        return -charge * jnp.sum(1 / r) + jnp.sum(1 / apart)

    return System(
        exact=exact,
        log_psi=log_psi,
        init=init,
        local_energies=continuous(log_psi, potential),
        walker=lambda key, count: jax.random.normal(key, (count, charge, 3)),
        propose=gaussian_moves,
        tolerance=tolerance,
    )


def ising(sites: int = 10, field: float = 1.0) -> System:
    """The transverse-field Ising ring, H = -sum z_i z_i+1 - field sum x_i, by a restricted Boltzmann machine.

    Its parameters are complex, as in NetKet's `models.RBM`; the exact energy is that of the dense matrix.
    """

    def log_psi(params: Params, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.log(jnp.cosh(x @ params["w"] + params["b"])), -1) + x @ params["a"]

    def local_energies(params: Params, x: jax.Array) -> jax.Array:
        flips = x[:, None] * (1 - 2 * jnp.eye(sites))
        ratios = jnp.exp(log_psi(params, flips.reshape(-1, sites)).reshape(-1, sites) - log_psi(params, x)[:, None])
        return -jnp.sum(x * jnp.roll(x, 1, -1), -1) - field * jnp.sum(ratios, -1)

    def init(key: jax.Array) -> Params:
        def small(key: jax.Array, *shape: int) -> jax.Array:
            real, imag = jax.random.split(key)
            return 0.05 * jax.lax.complex(jax.random.normal(real, shape), jax.random.normal(imag, shape))

        w, b, a = jax.random.split(key, 3)
        return {"w": small(w, sites, sites), "b": small(b, sites), "a": small(a, sites)}

    return System(
        exact=_ising_exactly(sites, field),
        log_psi=log_psi,
        init=init,
        local_energies=local_energies,
        walker=lambda key, count: jax.random.rademacher(key, (count, sites), float),
        propose=spin_flips,
        tolerance=1e-2,
    )


def _ising_exactly(sites: int, field: float) -> float:
    states = np.arange(2**sites)
    spins = 1 - 2 * ((states[:, None] >> np.arange(sites)) & 1)
    matrix = np.diag(-np.sum(spins * np.roll(spins, 1, axis=1), axis=1).astype(float))
    for site in range(sites):
        matrix[states, states ^ (1 << site)] -= field
    return float(np.linalg.eigvalsh(matrix)[0])


SYSTEMS: dict[str, Callable[[], System]] = {
    "oscillator": oscillator,
    "hydrogen": lambda: atom(1, -0.5, 1e-3),
    "helium": lambda: atom(2, -2.903724, 5e-3),
    "lithium": lambda: atom(3, -7.478060, 3e-2),
    "ising": ising,
}
"""Exact energies in hartree; helium's and lithium's from Pekeris (1959) and Yan and Drake (1995)."""
