"""A physics-informed network solves -u'' = f on (0, 1) with u(0) = u(1) = 0, to a relative error of about 1e-6.

    python examples/pinn_poisson.py

The loss has two terms, each with its own set of points: the equation inside, and the values at both ends. With
residuals as outputs and few points, the exact Gauss-Newton direction is a linear system of the size of the points,
whatever the size of the network. `egn` takes it with a trust region, `spring` with momentum; Adam takes gradients of
the same loss. Everything runs in float64, which such accuracy needs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

import curvax
from curvax.training import Evaluate

Params = list[dict[str, jax.Array]]
WIDTHS = (1, 32, 32, 1)
POINTS = 100
ADAM_STEPS_PER_STEP = 25


def exact(x: jax.Array) -> jax.Array:
    """The solution at one point."""
    return jnp.sin(2 * jnp.pi * x) * jnp.exp(x)


def minus_second_derivative(u: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """-u'' at points (B,) -> (B,), by two forward-mode derivatives."""
    one = jnp.ones((), x.dtype)

    def slope(t: jax.Array) -> jax.Array:
        return jax.jvp(u, (t,), (one,))[1]

    return jax.vmap(lambda t: -jax.jvp(slope, (t,), (one,))[1])(x)


def init(key: jax.Array) -> Params:
    # The first layer's slopes are of the order of the wave number, its kinks spread over the interval.
    scales = (4.0, *(1 / width**0.5 for width in WIDTHS[1:-1]))
    layers = []
    for k, a, b, scale in zip(jax.random.split(key, len(scales)), WIDTHS[:-1], WIDTHS[1:], scales, strict=True):
        w, bias = jax.random.split(k)
        kinks = scale * jax.random.uniform(bias, (b,), minval=-1) / a
        layers.append({"w": scale * jax.random.normal(w, (a, b)), "b": kinks})
    return layers


def network(params: Params, x: jax.Array) -> jax.Array:
    """u at one point."""
    hidden = x[None]
    for layer in params[:-1]:
        hidden = jnp.tanh(hidden @ layer["w"] + layer["b"])
    return (hidden @ params[-1]["w"] + params[-1]["b"])[0]


def values(params: Params, x: jax.Array) -> jax.Array:
    """u at points (B,) -> (B,)."""
    return jax.vmap(lambda t: network(params, t))(x)


def relative_error(params: Params) -> jax.Array:
    """|u - u*| / |u*| in L2, on a grid that training never sees."""
    x = jnp.linspace(0, 1, 2001)
    return jnp.linalg.norm(values(params, x) - exact(x)) / jnp.linalg.norm(exact(x))


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    parser = argparse.ArgumentParser(description="Poisson's equation by a physics-informed network, three optimizers.")
    parser.add_argument("--steps", type=int, default=200, help="Gauss-Newton steps (200); Adam takes 25 times as many")
    steps = parser.parse_args().steps
    x = (jnp.arange(POINTS) + 0.5) / POINTS
    forcing = minus_second_derivative(exact, x)
    # Residuals in units of f, so that loss and damping are of the order of one.
    unit = jnp.std(forcing)
    ends = {"x": jnp.array([0.0, 1.0]), "y": jnp.zeros(2)}
    batch = {"interior": {"x": x, "y": forcing / unit}, "boundary": ends}

    def residual(params: Params, x: jax.Array) -> jax.Array:
        """What curvax calls the outputs of the first term: -u'' at the points, with f as the targets."""
        return minus_second_derivative(lambda t: network(params, t), x) / unit

    terms = curvax.Terms(interior=curvax.Term(residual), boundary=curvax.Term(values))
    many = ADAM_STEPS_PER_STEP * steps
    # The best first learning rate of 0.001, 0.003, 0.01, 0.03 and 0.1.
    adam = curvax.first_order(optax.adam(optax.cosine_decay_schedule(3e-2, many)), loss=terms)
    contenders = {
        "egn": (curvax.egn(loss=terms), steps),
        "spring": (curvax.spring(loss=terms), steps),
        "adam": (adam, many),
    }
    for name, (method, count) in contenders.items():
        evaluate = Evaluate(relative_error, every=max(count // 8, 1), name="error")
        history = curvax.fit(method, init(jax.random.key(0)), batch, count, evaluate=evaluate, progress=False).history
        for step, seconds, error in zip(*history.evaluations.values(), strict=True):
            print(f"{name:<7} step {step:>5} {seconds:7.2f} s   relative L2 error {error:.1e}", flush=True)


if __name__ == "__main__":
    main()
