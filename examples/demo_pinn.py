"""A physics-informed network in float64, four optimizers, the same seconds for each: error against time.

    python examples/demo_pinn.py           # trains, prints a table, writes demo_pinn.png
    python examples/demo_pinn.py --tune    # how the rates of Adam and SOAP were chosen

The equation is -laplacian u = f on the unit square with u = 0 on its edges, solved by u = sin(pi x) sin(2 pi y). The
loss has two terms, each with its own points: the equation at 400 points inside, the values at 80 on the edges.
`curvax.gauss_newton` runs at its defaults and so does Optax's L-BFGS. Adam and SOAP have their rates tuned, each the
best of five by the final error from another start, with cosine decay to zero over the steps that the time allows.
CPU_TIME=1 in the environment counts processor time, which does not see who else uses the machine.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from _report import Words, draw_race, table_of_race

import curvax
from curvax.optimizers import soap
from curvax.training import Evaluate, FitResult, Progress, Stop

Params = list[dict[str, jax.Array]]
WIDTHS = (2, 32, 32, 1)
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
GOALS = (1e-2, 1e-3, 1e-4, 1e-5)
CPU_TIME = bool(int(os.environ.get("CPU_TIME", "0")))
CLOCK = time.process_time if CPU_TIME else time.perf_counter


def init(key: jax.Array) -> Params:
    keys = jax.random.split(key, len(WIDTHS) - 1)
    pairs = zip(keys, WIDTHS[:-1], WIDTHS[1:], strict=True)
    return [{"w": jax.random.normal(k, (a, b)) / a**0.5, "b": jnp.zeros(b)} for k, a, b in pairs]


def network(params: Params, z: jax.Array) -> jax.Array:
    """u at one point (2,)."""
    for layer in params[:-1]:
        z = jnp.tanh(z @ layer["w"] + layer["b"])
    return (z @ params[-1]["w"] + params[-1]["b"])[0]


def values(params: Params, x: jax.Array) -> jax.Array:
    """u at points (B, 2) -> (B,)."""
    return jax.vmap(lambda z: network(params, z))(x)


def residual(params: Params, x: jax.Array) -> jax.Array:
    """-laplacian u at points (B, 2) -> (B,), by two forward-mode derivatives along each axis."""

    def at(z: jax.Array) -> jax.Array:
        def second(e: jax.Array) -> jax.Array:
            return jax.jvp(lambda y: jax.jvp(lambda v: network(params, v), (y,), (e,))[1], (z,), (e,))[1]

        return -second(jnp.array([1.0, 0.0])) - second(jnp.array([0.0, 1.0]))

    # In units of f, so that both terms are of the order of one.
    return jax.vmap(at)(x) / (5 * jnp.pi**2)


def exact(x: jax.Array) -> jax.Array:
    return jnp.sin(jnp.pi * x[:, 0]) * jnp.sin(2 * jnp.pi * x[:, 1])


def square(count: int) -> jax.Array:
    """A grid of count^2 points inside."""
    t = (jnp.arange(count) + 0.5) / count
    return jnp.stack(jnp.meshgrid(t, t), axis=-1).reshape(-1, 2)


def points() -> dict[str, dict[str, jax.Array]]:
    inside, t = square(20), (jnp.arange(20) + 0.5) / 20
    sides = [(t, 0 * t), (t, 0 * t + 1), (0 * t, t), (0 * t + 1, t)]
    edge = jnp.concatenate([jnp.stack(side, axis=-1) for side in sides])
    return {"inside": {"x": inside, "y": exact(inside)}, "edge": {"x": edge, "y": jnp.zeros(len(edge))}}


def error(params: Params) -> jax.Array:
    """|u - u*| / |u*| in L2, on a grid that training never sees."""
    x = square(51)
    return jnp.linalg.norm(values(params, x) - exact(x)) / jnp.linalg.norm(exact(x))


def run(name: str, method: curvax.AbstractMethod, seconds: float, seed: int = 0, steps: int = 10**7) -> FitResult:
    return curvax.fit(
        method, init(jax.random.key(seed)), points(), steps,
        stop=Stop(seconds=seconds), evaluate=Evaluate(error, name="error"), progress=Progress(f"{name:<12}"),
        clock=CLOCK,
    )  # fmt: skip


def decayed(make: Callable[..., optax.GradientTransformation], rate: float, steps: int) -> curvax.AbstractMethod:
    return curvax.first_order(make(optax.cosine_decay_schedule(rate, steps)), loss=TERMS)


def steps_in(make: Callable[..., optax.GradientTransformation], seconds: float) -> int:
    """Steps that the time allows, from a short run."""
    method = decayed(make, 1e-3, 10**6)
    history = curvax.fit(
        method, init(jax.random.key(1)), points(), 10**7, stop=Stop(seconds=seconds / 10), progress=False, clock=CLOCK
    ).history
    return max(int(len(history) / history.seconds[-1] * seconds), 1)


TERMS = curvax.Terms(inside=curvax.Term(residual), edge=curvax.Term(values))
OPTIMIZERS = {"Adam": (optax.adam, 3e-3), "SOAP": (soap, 3e-3)}


NAMES = ("gauss_newton", "L-BFGS", *OPTIMIZERS)


def compete(name: str, seconds: float) -> FitResult:
    """A run of one of them."""
    if name == "gauss_newton":
        return run(name, curvax.gauss_newton(loss=TERMS), seconds)
    if name == "L-BFGS":
        return run(name, curvax.first_order(optax.lbfgs(), loss=TERMS, reuse_gradient=True), seconds)
    make, rate = OPTIMIZERS[name]
    steps = steps_in(make, seconds)
    return run(name, decayed(make, rate, steps), seconds, steps=steps)


def tune(seconds: float) -> None:
    """Prints the final error of every rate, from another start."""
    for name, (make, _) in OPTIMIZERS.items():
        steps = steps_in(make, seconds)
        for rate in RATES:
            result = run(name, decayed(make, rate, steps), seconds, seed=1, steps=steps)
            print(f"{name} {rate:g}: error {result.history.evaluations['error'][-1]:.2e}", flush=True)


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    parser = argparse.ArgumentParser(description="A physics-informed network: curvax, L-BFGS, SOAP, Adam.")
    parser.add_argument("names", nargs="*", metavar="OPTIMIZER", help=f"from {', '.join(NAMES)}; all by default")
    parser.add_argument("--seconds", type=float, default=15, help="of training, for each optimizer (15)")
    parser.add_argument("--picture", type=Path, default=Path("demo_pinn.png"), help="where it is drawn (demo_pinn.png)")
    parser.add_argument("--tune", action="store_true", help="try all rates of Adam and SOAP")
    options = parser.parse_args()
    if unknown := set(options.names) - set(NAMES):
        parser.error(f"there is no optimizer {min(unknown)!r}: choose from {', '.join(NAMES)}.")
    if options.tune:
        return tune(options.seconds)
    results = {name: compete(name, options.seconds) for name in options.names or NAMES}
    print(table_of_race(results, "error", GOALS))
    ours, *others = (result.history.evaluations["error"][-1] for result in results.values())
    ratios = ", ".join(
        f"{e / ours:.0f} times smaller than {n}'s" for n, e in zip(list(results)[1:], others, strict=True)
    )
    print(f"What you see: after {options.seconds:g} s the error of {next(iter(results))}, untuned, is {ratios}.")
    seconds = "CPU seconds of training" if CPU_TIME else "seconds of training"
    words = Words("Poisson's equation by a physics-informed network, float64", "relative L2 error", seconds)
    draw_race(results, "error", words, options.picture)
    return None


if __name__ == "__main__":
    main()
