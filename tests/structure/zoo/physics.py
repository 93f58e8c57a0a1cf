"""Residuals of differential equations, spectra, kernels: derivatives and linear algebra inside a model."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tests.structure.zoo.entry import bias, dense, explicit, model, scale

PINN = dict(w=dense(2, 4), b=bias(4), v=dense(4, 4), c=bias(4), o=dense(4, 1))


def _network(p: Any, x: jax.Array) -> jax.Array:
    return (jnp.tanh(jnp.tanh(x @ p["w"] + p["b"]) @ p["v"] + p["c"]) @ p["o"])[0]


@model("residual by grad", (2,), PINN)
def pinn_reverse(p: Any, x: jax.Array) -> jax.Array:
    """u_xx - u_y by reverse over reverse mode."""

    def residual(point: jax.Array) -> jax.Array:
        gradient = jax.grad(_network, argnums=1)
        return jax.hessian(_network, argnums=1)(p, point)[0, 0] - gradient(p, point)[1]

    return jax.vmap(residual)(x)[:, None]


@model("residual by jvp", (2,), PINN)
def pinn_forward(p: Any, x: jax.Array) -> jax.Array:
    direction = jnp.asarray([1.0, 0.0], x.dtype)

    def along(point: jax.Array) -> jax.Array:
        return jax.jvp(lambda y: _network(p, y), (point,), (direction,))[1]

    return jax.vmap(lambda point: jax.jvp(along, (point,), (direction,))[1] + _network(p, point))(x)


@model("spectral layer", (3,), dict(w=dense(3, 4), re=scale(3), im=scale(3), b=bias(4)))
def fourier(p: Any, x: jax.Array) -> jax.Array:
    """A spectral layer: complex weights from two real leaves."""
    modes = jnp.fft.rfft(x @ p["w"], axis=-1) * lax.complex(p["re"], p["im"])
    return jnp.fft.irfft(modes, n=4, axis=-1) + p["b"]


@model("magnitudes of a spectrum", (3,), dict(w=dense(3, 4), v=dense(4, 2)))
def fourier_features(p: Any, x: jax.Array) -> jax.Array:
    return jnp.abs(jnp.fft.fft(x @ p["w"])) @ p["v"]


@model("random features and a solve", (3,), dict(w=dense(3, 3), l=explicit(3, 3)))
def kernel_machine(p: Any, x: jax.Array) -> jax.Array:
    """Random features, then a triangular solve with learnt factors."""
    h = jnp.cos(x @ jax.random.normal(jax.random.key(0), (3, 3), x.dtype)) @ p["w"]
    factor = jnp.tril(p["l"], -1) + 2.0 * jnp.eye(3, dtype=x.dtype)
    return jax.scipy.linalg.solve_triangular(factor, h.T, lower=True).T
