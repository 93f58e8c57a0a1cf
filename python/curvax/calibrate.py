"""Measures the rates of a machine for the planner, in under a minute: `curvax calibrate`.

Each rate comes from work as curvax does it: products of the sizes that a step has and not the largest that would show
the processor at its best, Cholesky factorizations by the kernel of the direct solver, and small operations in a loop
inside one program, so that no call from Python is timed.

    rate            work                                            seconds taken as
    flops           x @ w, x^T @ y of 256 to 1,024 rows             geometric mean over products
    bandwidth       y + a x of 256 MiB                              three passes
    cached          the same of 1 MiB, 200 times in a loop          three passes each
    cache           the largest y + a x nearer to `cached`          size where the rate falls to the mean of both
    launch          8 x 8 products one after another in a loop      each is one operation
    factorization,  a direct solve of two sizes n                   n^3 / (3 r) (1 + h / n), solved for r and h
      half_rate
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from datetime import date

import jax
import jax.numpy as jnp
import numpy as np

from curvax.kernels.batched_cholesky_solve import batched_cholesky_solve
from curvax.plan.machine import Machine, uncalibrated

_MIB = 2**20
_STREAM, _NEAR = 256 * _MIB, _MIB
_SIZES = tuple(2**k * _MIB for k in range(0, 8))
_LAUNCHES = 2000
# (rows, inputs, outputs) of the products of a layer.
_PRODUCTS = ((256, 512, 512), (1024, 512, 512), (512, 1024, 1024))
_FACTORIZED = (512, 2048)


def calibrate(progress: Callable[[str], None] = lambda _: None) -> Machine:
    """Measures the default device; what could not be measured keeps the value written in `curvax.plan.machine`.

    Nothing is stored: `curvax.plan.machine.store` does that.

    Args:
      progress: is told what is measured next.

    Returns:
      The rates, under a name with device and date.
    """
    guess = uncalibrated()
    progress("matrix products")
    single, double = _products(jnp.float32), _products(jnp.float64)
    progress("convolutions")
    convolution = _convolution()
    progress("memory")
    bandwidth, cached, cache = _memory(guess)
    progress("small operations")
    launch = _launch()
    progress("factorizations")
    factorization, half_rate = _factorization()
    return Machine(
        name=f"{jax.local_devices()[0].device_kind}, calibrated {date.today().isoformat()}",
        flops=single,
        convolution=convolution,
        narrowing=max(1.0, single / double),
        bandwidth=bandwidth,
        cached=cached,
        cache=cache,
        launch=launch,
        factorization=factorization,
        half_rate=half_rate,
    )


def comparison(measured: Machine) -> str:
    """The rates beside those that the planner has without a calibration, a line each."""
    guess = uncalibrated()
    lines = [f"{'':<28}{'measured':>12}{'built in':>12}"]
    for label, name, unit in (
        ("products, GFLOP/s", "flops", 1e9),
        ("convolutions, GFLOP/s", "convolution", 1e9),
        ("float64 takes, times", "narrowing", 1.0),
        ("memory, GB/s", "bandwidth", 1e9),
        ("cache, GB/s", "cached", 1e9),
        ("cache, MB", "cache", 1e6),
        ("an operation, us", "launch", 1e-6),
        ("Cholesky, GFLOP/s", "factorization", 1e9),
        ("half of that at size", "half_rate", 1.0),
    ):
        lines.append(f"{label:<28}{getattr(measured, name) / unit:>12.4g}{getattr(guess, name) / unit:>12.4g}")
    return "\n".join(lines)


def _seconds(work: Callable[..., jax.Array], *arguments: jax.Array, budget: float = 1.0) -> float:
    """The median time of a compiled call: at least 3 of them, as many as the budget in seconds allows, at most 50."""
    run = jax.jit(work)
    run(*arguments).block_until_ready()
    taken: list[float] = []
    while len(taken) < 3 or (sum(taken) < budget and len(taken) < 50):
        began = time.perf_counter()
        run(*arguments).block_until_ready()
        taken.append(time.perf_counter() - began)
    return float(np.median(taken))


def _normal(*shape: int, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)


def _mean(rates: Sequence[float]) -> float:
    """The geometric mean: a rate is as often twice too high as twice too low."""
    return math.exp(sum(map(math.log, rates)) / len(rates))


def _products(dtype: jax.typing.DTypeLike) -> float:
    """FLOP/s of a layer's forward product and of the product for its weights."""
    multiply = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    rates = []
    with jax.enable_x64(jnp.dtype(dtype).itemsize > 4):
        for rows, inputs, outputs in _PRODUCTS:
            x, w, y = (_normal(*s, dtype=dtype) for s in ((rows, inputs), (inputs, outputs), (rows, outputs)))
            flops = 2 * rows * inputs * outputs
            rates += [flops / _seconds(multiply, x, w, budget=0.5)]
            rates += [flops / _seconds(lambda x, y: multiply(x.T, y), x, y, budget=0.5)]
    return _mean(rates)


def _convolution() -> float:
    """FLOP/s of a 3 x 3 convolution of 64 channels on 32 images of 16 x 16."""
    images, kernel = _normal(32, 16, 16, 64), _normal(3, 3, 64, 64)

    def apply(images: jax.Array, kernel: jax.Array) -> jax.Array:
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=layout)

    return 2 * 32 * 16 * 16 * 9 * 64 * 64 / _seconds(apply, images, kernel)


def _rate(size: int, times: int) -> float:
    """Bytes per second of y + a x, `times` over, with operands of `size` bytes: two are read and one is written."""
    x = _normal(size // 4)

    def repeat(x: jax.Array) -> jax.Array:
        # An operand that the loop cannot lift out: a is the loop's own counter.
        return jax.lax.fori_loop(0, times, lambda k, y: y + (k * 1e-9).astype(y.dtype) * x, x)

    return 3 * size * times / _seconds(repeat, x)


def _memory(guess: Machine) -> tuple[float, float, float]:
    """Bytes per second from memory and from the cache, and bytes of the cache."""
    far, near = _rate(_STREAM, 2), _rate(_NEAR, 200)
    if near < 1.2 * far:
        return far, far, guess.cache
    between = math.sqrt(far * near)
    inside = [size for size in _SIZES if _rate(size, max(2, 64 * _MIB // size)) > between]
    # x and y are alive.
    return far, near, float(2 * max(inside, default=_NEAR))


def _launch() -> float:
    """Seconds of one small operation inside a program."""

    def chain(x: jax.Array) -> jax.Array:
        step = lambda _, y: jnp.matmul(x, jnp.matmul(x, jnp.matmul(x, jnp.matmul(x, y))))  # noqa: E731
        return jax.lax.fori_loop(0, _LAUNCHES // 4, step, x)

    return _seconds(chain, jnp.eye(8, dtype=jnp.float32)) / _LAUNCHES


def _factorization() -> tuple[float, float]:
    """r and h of n^3 / (3 r) (1 + h / n), from two sizes n."""
    small, large = _FACTORIZED
    seconds = []
    for size in _FACTORIZED:
        half = _normal(size, size)
        matrix = half @ half.T + size * jnp.eye(size, dtype=jnp.float32)
        seconds.append(_seconds(lambda m, b: batched_cholesky_solve(m, b).value, matrix[None], half[:1]))
    # 1. t(n) 3 / n^3 = 1/r + (h/r) / n: a line in 1/n.
    slow, fast = (3 * t / size**3 for t, size in zip(seconds, _FACTORIZED, strict=True))
    # 2. Its slope h/r; noise must not turn it.
    slope = max(0.0, (slow - fast) / (1 / small - 1 / large))
    # 3. Its value at 1/n = 0; where the slope explains all of the time, half of it.
    inverse = max(fast - slope / large, fast / 2)
    return 1 / inverse, max(slope / inverse, 1.0)
