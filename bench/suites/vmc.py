"""A step of variational Monte Carlo on given samples and local energies, beside NetKet's SR and minSR.

All solve (S + lam I) d = F with the same samples, by Cholesky; the directions are compared before they are timed. Where
NetKet is not installed curvax runs alone, without a ratio.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import curvax
from bench import run
from bench.schema import Row

SUITE = "vmc"
LAM = 1e-3
# Sites, hidden units per site, samples, complex parameters.
CASES = (
    ("rbm, 867 parameters, 512 samples", 16, 3, 512, False),
    ("rbm, 20,300 parameters, 4,096 samples", 100, 2, 4096, False),
    ("complex rbm, 1,920 complex parameters, 1,024 samples", 24, 3, 1024, True),
)


def run_suite(quick: bool = False, only: str = "") -> Iterator[list[Row]]:
    """Milliseconds of one update.

    Args:
      quick: the first case alone.
      only: substring of the case names to run.
    """
    jax.config.update("jax_enable_x64", True)
    for name, sites, density, samples, complex_parameters in CASES[:1] if quick else CASES:
        if only in name:
            yield _case(name, _problem(sites, density * sites, samples, complex_parameters), 3 if quick else 15)


def _log_psi(params: Any, x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.log(jnp.cosh(x @ params["w"] + params["b"])), -1) + x @ params["a"]


def _problem(sites: int, hidden: int, samples: int, complex_parameters: bool) -> tuple[Any, dict[str, jax.Array]]:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        values = rng.standard_normal(shape) / sites
        return jnp.asarray(values + 1j * rng.standard_normal(shape) / sites if complex_parameters else values)

    params = {"w": normal(sites, hidden), "b": normal(hidden), "a": normal(sites)}
    energies = rng.standard_normal(samples) + (1j * rng.standard_normal(samples) if complex_parameters else 0)
    x = jnp.asarray(rng.choice([-1.0, 1.0], (samples, sites)))
    return params, {"x": x, "y": jnp.asarray(energies)}


def _case(name: str, problem: tuple[Any, dict[str, jax.Array]], rounds: int) -> list[Row]:
    params, batch = problem
    method = curvax.vmc(predict_fn=_log_psi, lam0=LAM, clip=None, learning_rate=1.0)
    state = method.init(params)
    step = jax.jit(lambda p: method.step(p, batch, state)[0])

    def ours(p: Any) -> Any:
        return jax.tree.map(jnp.subtract, p, step(p))

    kinds = ("SR", "minSR") if importlib.util.find_spec("netket") else ()
    peers = {f"NetKet {kind}": partial(_netket(kind), params, batch) for kind in kinds}
    direction = ours(params)
    for peer, update in peers.items():
        _check_alike(name, peer, direction, update())
    best = "NetKet minSR" if peers else None
    candidates = [
        *(run.Candidate(peer, lambda _, update=update: update(), lambda: params) for peer, update in peers.items()),
        run.Candidate("curvax.vmc", lambda _: step(params), lambda: params, baseline=best, goal=0.5 if best else None),
    ]
    return run.rows(SUITE, name, "Cholesky", run.time_all(candidates, rounds, budget=60))


def _netket(kind: str) -> Callable[..., Any]:
    """The update of NetKet's drivers for one kind of solve, half of it: they solve for the gradient, 2 F."""
    import netket
    from netket._src.ngd.sr_srt_common import sr, srt

    mode_of = {False: "real", True: "complex"}

    def update(params: Any, batch: dict[str, jax.Array]) -> Any:
        result, _, _ = (sr if kind == "SR" else srt)(
            _netket_log_psi,
            batch["y"],
            params,
            {},
            batch["x"],
            diag_shift=LAM,
            solver_fn=netket.optimizer.solver.cholesky,
            mode=mode_of[jnp.iscomplexobj(params["w"])],
        )
        return jax.tree.map(lambda x: x / 2, result)

    return update


def _netket_log_psi(variables: Any, x: jax.Array) -> jax.Array:
    return _log_psi(variables["params"], x)


def _check_alike(case: str, peer: str, ours: Any, theirs: Any) -> None:
    flat = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (ours, theirs)]
    error = np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[1])
    if error > 1e-6:
        raise AssertionError(f"{case}: curvax and {peer} differ by {error:.1e}.")
