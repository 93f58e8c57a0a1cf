"""A process that makes steps of one kind and says how long each took.

    python -m bench.suites.linalg.worker STEP

Reads how many steps to make, a number a line, and answers with their seconds as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp

import curvax
from bench.workloads import MLP
from curvax.losses import SoftmaxCrossEntropy

_BATCH = 128


def _method(made: curvax.Method) -> tuple[Callable[[Any], Any], Any]:
    params, batch = MLP.params(), MLP.batch(_BATCH)
    step, key = jax.jit(made.step, donate_argnums=(0, 2)), jax.random.key(0)
    return lambda carry: step(carry[0], batch, carry[1], key)[:2], (params, made.init(params, batch=batch))


def _kfac() -> tuple[Callable[[Any], Any], Any]:
    return _method(curvax.kfac(predict_fn=MLP.predict, loss=SoftmaxCrossEntropy(), inverse_every=1))


def _ekfac() -> tuple[Callable[[Any], Any], Any]:
    return _method(curvax.ekfac(predict_fn=MLP.predict, loss=SoftmaxCrossEntropy(), inverse_every=1))


def _egn() -> tuple[Callable[[Any], Any], Any]:
    return _method(curvax.egn_ce(predict_fn=MLP.predict, lam0=0.1, learning_rate=1e-3))


def _egn_reference() -> tuple[Callable[[Any], Any], Any]:
    return _method(curvax.egn_ce(predict_fn=MLP.predict, lam0=0.1, learning_rate=1e-3, backend="reference"))


def _soap() -> tuple[Callable[[Any], Any], Any]:
    tx, params, batch = curvax.optimizers.soap(1e-3, every=1), MLP.params(), MLP.batch(_BATCH)

    def step(params: Any, state: Any) -> Any:
        update, state = tx.update(jax.grad(MLP.cross_entropy)(params, batch), state, params)
        return jax.tree.map(jnp.add, params, update), state

    jitted = jax.jit(step, donate_argnums=(0, 1))
    return lambda carry: jitted(*carry), (params, tx.init(params))


STEPS: dict[str, Callable[[], tuple[Callable[[Any], Any], Any]]] = {
    "kfac, inverse_every=1": _kfac,
    "ekfac, inverse_every=1": _ekfac,
    "soap, every=1": _soap,
    "egn_ce": _egn,
    'egn_ce, backend="reference"': _egn_reference,
}


def main() -> None:
    """Answers until its input ends."""
    step, carry = STEPS[sys.argv[1]]()
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            begin = time.perf_counter()
            carry = jax.block_until_ready(step(carry))
            seconds.append(time.perf_counter() - begin)
        print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    main()
