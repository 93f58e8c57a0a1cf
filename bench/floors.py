"""What a step cannot be faster than: the bare mathematics, written by hand, without any of a library's bookkeeping."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bench.workloads import PyTree, Workload

Step = Callable[[Any], Any]


def adamw(work: Workload, batch: dict[str, jax.Array]) -> tuple[Step, Callable[[], Any]]:
    """`value_and_grad` of the cross entropy and `optax.adamw`."""
    return first_order(work, batch, optax.adamw(1e-3))


def first_order(
    work: Workload, batch: dict[str, jax.Array], tx: optax.GradientTransformation
) -> tuple[Step, Callable[[], Any]]:
    """A gradient and an Optax chain; carry (params, state, loss)."""

    def step(params: PyTree, state: Any, data: Any) -> tuple[PyTree, Any, jax.Array]:
        loss, gradient = jax.value_and_grad(work.cross_entropy)(params, data)
        update, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, update), state, loss

    jitted = jax.jit(step, donate_argnums=(0, 1))

    def carry() -> Any:
        params = work.params()
        return params, tx.init(params), jnp.zeros(())

    return lambda c: jitted(c[0], c[1], batch), carry


def products(work: Workload, batch: dict[str, jax.Array], count: int) -> tuple[Step, Callable[[], Any]]:
    """One linearization, one gradient, `count` Gauss-Newton products, each of the last one's result; carry (params, v).

    The product in output space is scaled to unit size, so that no power of the matrix overflows or sinks into denormal
    numbers; on batch x outputs numbers that costs nothing.
    """

    def step(params: PyTree, data: Any) -> tuple[PyTree, PyTree]:
        outputs, jvp = jax.linearize(lambda p: work.predict(p, data["x"]), params)
        vjp = jax.linear_transpose(jvp, params)
        p = jax.nn.softmax(outputs)
        (gradient,) = vjp((p - jax.nn.one_hot(data["y"], work.outputs, dtype=p.dtype)) / p.shape[0])

        def product(_: Any, v: PyTree) -> PyTree:
            u = jvp(v)
            u = p * (u - jnp.sum(p * u, axis=-1, keepdims=True))
            return vjp(u / jnp.linalg.norm(u))[0]

        # The result depends on both, so neither is removed; params move by next to nothing.
        last = jax.lax.fori_loop(0, count, product, gradient)
        return jax.tree.map(lambda w, v: w - 1e-6 * v, params, last), last

    jitted = jax.jit(step, donate_argnums=(0,))
    return lambda c: jitted(c[0], batch), lambda: (work.params(), None)


def matmuls(work: Workload, batch: dict[str, jax.Array], count: int) -> tuple[Step, Callable[[], Any]]:
    """The matrix products of `count` Gauss-Newton products of a dense network and nothing else; carry (tangent, data).

    What is left of the time of `products` above this is elementwise work and the loop itself.
    """
    weights = [w for w, _ in work.params()]
    rng = jax.random.key(0)
    hidden = [jax.random.normal(rng, (batch["x"].shape[0], w.shape[0]), w.dtype) for w in weights]

    def step(tangent: list[jax.Array], data: Any) -> list[jax.Array]:
        ws, hs = data

        def product(_: Any, v: list[jax.Array]) -> list[jax.Array]:
            u = hs[0] @ v[0]
            for w, h, t in zip(ws[1:], hs[1:], v[1:], strict=True):
                u = u @ w + h @ t
            back = []
            for w, h in zip(reversed(ws), reversed(hs), strict=True):
                back.append(h.T @ u)
                if h is not hs[0]:
                    u = u @ w.T
            # Back to size one by a constant: weights and activations are standard normal.
            return [b * 1e-6 for b in reversed(back)]

        return jax.lax.fori_loop(0, count, product, tangent)

    jitted = jax.jit(step, donate_argnums=(0,))
    data = (weights, hidden)
    return lambda c: jitted(c, data), lambda: [w * 1.0 for w in weights]


def matmul_flops(work: Workload, batch: int, count: int) -> float:
    """Floating-point operations of `matmuls`, which are those of the matrix products in `products`."""
    sizes = [shape[0] * shape[1] for shape in work.shapes[::2]]
    # Each layer's tangent and cotangent of the weights; all but the first also pass both through.
    return count * 2.0 * batch * (2 * sum(sizes) + 2 * sum(sizes[1:]))


def square_matmul(side: int, dtype: str = "float32") -> tuple[Step, Callable[[], Any]]:
    """One large square matrix product: the machine's rate for matrix products."""
    a = jax.random.normal(jax.random.key(0), (side, side), dtype) / side**0.5
    jitted = jax.jit(lambda x: x @ a, donate_argnums=(0,))
    return jitted, lambda: a * 1.0


def amortised(
    work: Workload, batch: dict[str, jax.Array], every: int, *, sampled: bool
) -> tuple[Step, Callable[[], Any]]:
    """`adamw`, and before every `every`-th of its steps one bare curvature evaluation, each jitted by itself.

    The evaluation is a gradient at sampled labels (`sampled`, Gauss-Newton-Bartlett) or a Hessian product with random
    signs (Hutchinson); nothing is averaged, kept or applied. Time it over multiples of `every` calls.
    """
    step, first = adamw(work, batch)

    def estimate(params: PyTree, data: Any, key: jax.Array) -> PyTree:
        if sampled:
            logits, vjp = jax.vjp(lambda p: work.predict(p, data["x"]), params)
            labels = jax.random.categorical(key, logits)
            residual = jax.nn.softmax(logits) - jax.nn.one_hot(labels, work.outputs, dtype=logits.dtype)
            return jax.tree.map(jnp.square, vjp(residual / logits.shape[0] ** 0.5)[0])
        leaves, structure = jax.tree.flatten(params)
        keys = jax.random.split(key, len(leaves))
        signs = [jax.random.rademacher(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
        z = jax.tree.unflatten(structure, signs)
        hz = jax.jvp(lambda p: jax.grad(work.cross_entropy)(p, data), (params,), (z,))[1]
        return jax.tree.map(jnp.multiply, z, hz)

    jitted = jax.jit(estimate)
    key = jax.random.key(0)

    def both(carry: Any) -> Any:
        count, inner, diagonal = carry
        if count % every == 0:
            diagonal = jitted(inner[0], batch, key)
        return count + 1, step(inner), diagonal

    return both, lambda: (0, first(), None)
