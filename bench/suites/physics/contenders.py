"""Who solves the equations: presets as they come, first-order methods and an expert's code at tuned rates, LM."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import curvax
from bench.suites.physics.pde import Params, Pde
from bench.suites.untuned.contenders import Contender, Stepped, Trainer, first_order, lbfgs
from bench.suites.untuned.problems.problem import Batch
from curvax.optimizers import soap

ADAM, EXPERT = "adam", "ENGD-W, an expert's own"
DEFAULTS = ("gauss_newton", "egn", "spring", "kfac")
_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
_DAMPINGS = (1e-4, 1e-7, 1e-10)
_SEARCHED = 31


def _preset(name: str) -> Callable[[Pde], Trainer]:
    def build(pde: Pde) -> Trainer:
        method = curvax.make(name, loss=pde.terms)

        def step(params: Params, state: Any, batch: Batch, rate: jax.Array, key: jax.Array) -> Stepped:
            del rate
            params, state, info = method.step(params, batch["terms"], state, key)
            return params, state, info["loss"]

        return Trainer(lambda params, batch: method.init(params, batch=batch["terms"]), step)

    return build


def expert(pde: Pde) -> Trainer:
    """Energy natural gradient in Woodbury's form (Guzman-Cordero et al. 2025) as one would write it.

    Explicit rows by `vmap` of reverse mode, their Gram matrix, one Cholesky factorization with a constant damping, here
    the rate, and the best of 31 step sizes 1, 1/2, 1/4, ...
    """

    def rows(params: Params, terms: Batch, name: str) -> jax.Array:
        def one(x: jax.Array) -> Any:
            return jax.jacrev(lambda p: pde.scale(name) * pde.model(name)(p, x[None])[0])(params)

        leaves = jax.tree.leaves(jax.vmap(one)(terms[name]["x"]))
        count = leaves[0].shape[0] * leaves[0].shape[1]
        return jnp.concatenate([leaf.reshape(count, -1) for leaf in leaves], axis=1)

    def step(params: Params, state: Any, batch: Batch, rate: jax.Array, key: jax.Array) -> Stepped:
        del key
        terms = batch["terms"]
        residuals = pde.residuals(params, terms)
        matrix = jnp.concatenate([rows(params, terms, name) for name in pde.conditions])
        gram = matrix @ matrix.T + rate * jnp.eye(len(residuals))
        flat = matrix.T @ jax.scipy.linalg.solve(gram, residuals, assume_a="pos")
        direction = _unraveled(flat, params)

        def moved(size: jax.Array) -> Params:
            return jax.tree.map(lambda p, d: p - size * d, params, direction)

        sizes = 0.5 ** jnp.arange(_SEARCHED)
        losses = jax.vmap(lambda size: pde.objective(moved(size), batch))(sizes)
        losses = jnp.where(jnp.isfinite(losses), losses, jnp.inf)
        return moved(sizes[jnp.argmin(losses)]), state, jnp.sum(jnp.square(residuals)) / 2

    return Trainer(lambda params, batch: (), step)


def _unraveled(flat: jax.Array, like: Params) -> Params:
    start, leaves = 0, []
    for leaf in jax.tree.leaves(like):
        leaves.append(flat[start : start + leaf.size].reshape(leaf.shape))
        start += leaf.size
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _optimistix(pde: Pde) -> Trainer:
    """Levenberg and Marquardt's method as optimistix has it, one step a call."""
    import equinox as eqx
    import optimistix

    solver = optimistix.LevenbergMarquardt(rtol=1e-300, atol=1e-300)
    static: list[Any] = []

    def function(params: Params, terms: Batch) -> tuple[jax.Array, None]:
        return pde.residuals(params, terms), None

    def init(params: Params, batch: Batch) -> Any:
        like, aux = jax.eval_shape(function, params, batch["terms"])
        state = solver.init(function, params, batch["terms"], {}, like, aux, frozenset())
        arrays, rest = eqx.partition(state, eqx.is_array)
        static[:] = [rest]
        return arrays

    def step(params: Params, state: Any, batch: Batch, rate: jax.Array, key: jax.Array) -> Stepped:
        del rate, key
        whole = eqx.combine(state, static[0])
        params, whole, _ = solver.step(function, params, batch["terms"], {}, whole, frozenset())
        return params, eqx.filter(whole, eqx.is_array), pde.objective(params, batch)

    return Trainer(init, step)


def _somax(pde: Pde) -> Trainer:
    """Gauss-Newton by CG with a trust region, the one preset of python-somax that takes joined sets."""
    import somax

    def joined(params: Params, x: Batch) -> jax.Array:
        return jnp.sqrt(count) * pde.residuals(params, x)[:, None]

    count = pde.count
    method = somax.make("sgn_mse", predict_fn=joined, lam_policy="trust_region")

    def step(params: Params, state: Any, batch: Batch, rate: jax.Array, key: jax.Array) -> Stepped:
        del rate
        data = {"x": batch["terms"], "y": jnp.zeros((count, 1))}
        params, state, _ = method.step(params, data, state, jax.random.key_data(key))
        return params, state, pde.objective(params, batch)

    return Trainer(lambda params, batch: method.init(params), step)


def _contenders() -> tuple[Contender[Pde], ...]:
    installed = (("optimistix", "optimistix LM", _optimistix), ("somax", "python-somax sgn_mse", _somax))
    return (
        *(Contender(name, _preset(name), "untuned") for name in DEFAULTS),
        Contender(ADAM, first_order(optax.adam), "tuned", _RATES),
        Contender("soap", first_order(soap), "tuned", _RATES),
        Contender("L-BFGS", lbfgs, "tuned", (1.0,)),
        Contender(EXPERT, expert, "tuned", _DAMPINGS),
        *(Contender(name, build, "tuned") for package, name, build in installed if importlib.util.find_spec(package)),
    )


CONTENDERS = _contenders()
