"""Variational Monte Carlo with natural gradients: ground states of a trap, three atoms and a spin chain.

    python examples/vmc                   # all systems, about two minutes on two cores
    python examples/vmc helium --steps 500 --walkers 2048 --momentum 0.9

For each system: the energy over the last fifth of the steps with its statistical error, and the exact one.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sampling import Walkers, metropolis
from systems import SYSTEMS, System

import curvax
from curvax.training import Sampler

jax.config.update("jax_enable_x64", True)


def run(system: System, method: curvax.Method, steps: int, walkers: int, moves: int = 20) -> tuple[float, float]:
    """The mean energy of the last fifth of the steps, and its standard error."""
    first, second, third = jax.random.split(jax.random.key(0), 3)
    params = system.init(first)
    sample = partial(metropolis, system.log_psi, propose=system.propose)
    start = Walkers(system.walker(second, walkers), jnp.asarray(0.3))
    start = jax.jit(partial(sample, moves=300))(params, start, key=third)

    def draw(key: jax.Array, params: Any, walkers: Walkers) -> tuple[dict[str, jax.Array], Walkers]:
        walkers = sample(params, walkers, key=key, moves=moves)
        return {"x": walkers.x, "y": system.local_energies(params, walkers.x)}, walkers

    batches = Sampler(draw, start)
    energies = curvax.fit(method, params, batches, steps, rng=jax.random.key(1), progress=False).history["loss"]
    last = energies[-max(steps // 5, 1) :]
    # Walkers of neighbouring steps are alike: errors of the means of ten steps each.
    blocks = last[: len(last) // 10 * 10].reshape(-1, 10).mean(1) if len(last) >= 20 else last
    return float(last.mean()), float(blocks.std(ddof=1) / np.sqrt(len(blocks))) if len(blocks) > 1 else float("nan")


def main() -> None:
    """Reads the command line and prints a line per system."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("systems", nargs="*", metavar="system", help=f"of {', '.join(SYSTEMS)}; all by default")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--walkers", type=int, default=512)
    parser.add_argument("--momentum", type=float, default=0.0, help="SPRING's")
    options = parser.parse_args()
    if unknown := set(options.systems) - set(SYSTEMS):
        parser.error(f"no such system: {', '.join(sorted(unknown))}")
    print(f"{'system':12} {'energy':>10} {'+-':>8} {'exact':>10} {'seconds':>8}")
    for name in options.systems or SYSTEMS:
        system, begin = SYSTEMS[name](), time.perf_counter()
        method = curvax.vmc(predict_fn=system.log_psi, momentum=options.momentum)
        energy, error = run(system, method, options.steps, options.walkers)
        print(
            f"{name:12} {energy:10.5f} {error:8.5f} {system.exact:10.5f} {time.perf_counter() - begin:8.1f}", flush=True
        )


if __name__ == "__main__":
    main()
