"""What a loss of several terms costs beside its parts and beside sets joined by hand."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import curvax
from bench import run
from bench.schema import Row
from curvax import Term, Terms
from curvax.losses import SquaredError

JOINED = "curvax, sets joined by hand in predict_fn"
PARTS = "curvax, interior alone"
EXPERT = "an expert's own: explicit rows by vmap of grad, Cholesky"
TERMS = "curvax, terms"
_LAM = 1e-3

Params = list[dict[str, jax.Array]]


def parameters(widths: tuple[int, ...]) -> Params:
    """A network from the plane to numbers, float64."""
    keys = jax.random.split(jax.random.key(0), len(widths))
    pairs = zip(keys, widths[:-1], widths[1:], strict=False)
    return [{"w": jax.random.normal(k, (a, b)) / np.sqrt(a), "b": jnp.zeros(b)} for k, a, b in pairs]


def network(params: Params, z: jax.Array) -> jax.Array:
    """u at one point."""
    for layer in params[:-1]:
        z = jnp.tanh(z @ layer["w"] + layer["b"])
    return (z @ params[-1]["w"] + params[-1]["b"])[0]


def values(params: Params, x: jax.Array) -> jax.Array:
    """u at points (B, 2) -> (B, 1)."""
    return jax.vmap(lambda z: network(params, z))(x)[:, None]


def laplacian(params: Params, x: jax.Array) -> jax.Array:
    """The Laplacian of u at points (B, 2) -> (B, 1), by two forward-mode derivatives along each axis."""

    def at(z: jax.Array) -> jax.Array:
        def second(e: jax.Array) -> jax.Array:
            return jax.jvp(lambda y: jax.jvp(lambda v: network(params, v), (y,), (e,))[1], (z,), (e,))[1]

        return second(jnp.array([1.0, 0.0])) + second(jnp.array([0.0, 1.0]))

    return jax.vmap(at)(x)[:, None]


def batch(interior: int, boundary: int) -> dict[str, Any]:
    """Random points, -laplacian u = 2 pi^2 sin(pi x) sin(pi y) inside and u = 0 at the border."""
    rng = np.random.default_rng(0)
    x, border = rng.random((interior, 2)), rng.random((boundary, 2))
    border[np.arange(boundary), np.arange(boundary) % 2] = np.arange(boundary) // 2 % 2
    forcing = -2 * np.pi**2 * np.prod(np.sin(np.pi * x), axis=1, keepdims=True)
    return {
        "interior": {"x": jnp.asarray(x), "y": jnp.asarray(forcing)},
        "boundary": {"x": jnp.asarray(border), "y": jnp.zeros((boundary, 1))},
    }


def step_rows(suite: str, quick: bool, only: str) -> Iterator[list[Row]]:
    """Rows, case by case.

    Args:
      suite: theirs.
      quick: few points and rounds.
      only: substring of the case names to run.
    """
    sizes = ((90, 12, (2, 16, 16, 1)),) if quick else ((900, 120, (2, 64, 64, 1)), (900, 120, (2, 32, 32, 32, 1)))
    for interior, boundary, widths in sizes:
        case = f"egn step, 2-D Poisson, {'-'.join(map(str, widths))}"
        if only in case:
            with jax.enable_x64(True):
                candidates = _candidates(parameters(widths), batch(interior, boundary))
                timings = run.time_all(candidates, 2 if quick else 7, budget=240.0)
            yield run.rows(suite, case, f"{interior} + {boundary} points", timings)


def _candidates(params: Params, data: dict[str, Any]) -> list[run.Candidate]:
    """One step of all points in three ways, and of the interior alone; every carry is (parameters, state)."""
    counts = {name: len(part["x"]) for name, part in data.items()}
    roots = {name: 1 / np.sqrt(count) for name, count in counts.items()}

    def joined(p: Params, x: dict[str, jax.Array]) -> jax.Array:
        return jnp.concatenate(
            [roots["interior"] * laplacian(p, x["interior"]), roots["boundary"] * values(p, x["boundary"])]
        )

    by_hand = {
        "x": {name: part["x"] for name, part in data.items()},
        "y": jnp.concatenate([roots[name] * data[name]["y"] for name in ("interior", "boundary")]),
    }
    options: dict[str, Any] = {"lam0": _LAM, "learning_rate": 1e-3}
    terms = Terms(interior=Term(laplacian), boundary=Term(values))
    summed = SquaredError(reduction="sum")
    candidates = [
        run.Candidate(JOINED, *_stepper(curvax.egn(predict_fn=joined, loss=summed, **options), params, by_hand)),
        run.Candidate(EXPERT, *_expert(params, by_hand, roots), baseline=JOINED),
        run.Candidate(
            PARTS,
            *_stepper(curvax.egn(predict_fn=laplacian, loss=SquaredError(), **options), params, data["interior"]),
            baseline=JOINED,
        ),
        run.Candidate(TERMS, *_stepper(curvax.egn(loss=terms, **options), params, data), baseline=EXPERT, goal=0.5),
    ]
    # Beside a candidate of minutes, whose pages the next one pays for.
    return [dataclasses.replace(c, untimed=int(c.name != JOINED)) for c in candidates]


def _stepper(method: Any, params: Params, data: Any) -> tuple[Callable[[Any], Any], Callable[[], Any]]:
    with warnings.catch_warnings():
        # That examples interact is what is measured.
        warnings.simplefilter("ignore", UserWarning)
        step = jax.jit(lambda carry: method.step(carry[0], data, carry[1])[:2])
        compiled = step.lower((params, method.init(params))).compile()
    return compiled, lambda: (params, method.init(params))


def _expert(
    params: Params, data: dict[str, Any], roots: dict[str, float]
) -> tuple[Callable[[Any], Any], Callable[[], Any]]:
    """ENGD in row space as one would write it: the Jacobian of all residuals, its Gram matrix, one Cholesky."""

    def rows(p: Params, name: str, model: Callable[..., jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
        def one(z: jax.Array) -> tuple[jax.Array, Params]:
            return jax.value_and_grad(lambda q: roots[name] * model(q, z[None])[0, 0])(p)

        outputs, gradients = jax.vmap(one)(data["x"][name])
        return outputs, [g.reshape(len(outputs), -1) for g in jax.tree.leaves(gradients)]

    def step(carry: Any) -> Any:
        p, _ = carry
        (u, inside), (v, border) = rows(p, "interior", laplacian), rows(p, "boundary", values)
        residual = jnp.concatenate([u, v]) - data["y"][:, 0]
        matrix = jnp.concatenate([jnp.concatenate(pair) for pair in zip(inside, border, strict=True)], axis=1)
        gram = matrix @ matrix.T + _LAM * jnp.eye(len(residual))
        flat = matrix.T @ jax.scipy.linalg.solve(gram, residual, assume_a="pos")
        start, new = 0, []
        for leaf in jax.tree.leaves(p):
            new.append(leaf - 1e-3 * flat[start : start + leaf.size].reshape(leaf.shape))
            start += leaf.size
        return jax.tree.unflatten(jax.tree.structure(p), new), ()

    return jax.jit(step), lambda: (params, ())
