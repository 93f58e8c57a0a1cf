"""Models put together at random from pieces that move, share, scale and reuse weights: rows and Gram stay right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from tests.structure.test_zoo import close, study

pytestmark = pytest.mark.usefixtures("x64")
TIME, WIDTH = 2, 3


@dataclass(frozen=True)
class Piece:
    """(B, 2, 3) to the same: what it computes with leaves of these shapes."""

    name: str
    shapes: dict[str, tuple[int, ...]]
    apply: Callable[[Any, jax.Array], jax.Array]

    def __repr__(self) -> str:
        return self.name


def _scan(p: Any, x: jax.Array) -> jax.Array:
    def cell(h: jax.Array, t: jax.Array) -> Any:
        h = jnp.tanh(h @ p["u"] + t @ p["w"] + p["b"])
        return h, h

    return jnp.swapaxes(lax.scan(cell, jnp.zeros_like(x[:, 0]), jnp.swapaxes(x, 0, 1), reverse=True)[1], 0, 1)


def _attention(p: Any, x: jax.Array) -> jax.Array:
    q, k, v = jnp.split(jnp.einsum("btd,de->bte", x, p["w"]), 3, axis=-1)
    return x + jax.nn.softmax(jnp.einsum("btd,bsd->bts", q, k)) @ v


def _convolution(p: Any, x: jax.Array) -> jax.Array:
    y = lax.conv_general_dilated(
        x, p["k"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=3
    )
    return jnp.tanh(y + p["b"])


SQUARE = (WIDTH, WIDTH)
PIECES = (
    Piece("dense", {"w": SQUARE, "b": (WIDTH,)}, lambda p, x: jnp.tanh(x @ p["w"] + p["b"])),
    Piece("transposed", {"w": SQUARE}, lambda p, x: x + jnp.sin(x @ p["w"].T) @ p["w"]),
    Piece("scaled", {"w": SQUARE, "b": (WIDTH,)}, lambda p, x: jax.nn.silu(x @ (p["w"] / 2.0) - 0.5 * p["b"])),
    Piece("over time", {"w": (TIME, TIME)}, lambda p, x: jnp.tanh(jnp.einsum("btd,ts->bsd", x, p["w"]))),
    Piece("weights per position", {"w": (TIME, *SQUARE)}, lambda p, x: x + jnp.einsum("btd,tde->bte", x, p["w"])),
    Piece("low rank", {"w": SQUARE, "a": (3, 1), "c": (1, 3)}, lambda p, x: jnp.tanh(x @ (p["w"] + p["a"] @ p["c"]))),
    Piece("gain", {"g": (WIDTH,), "b": (TIME, 1)}, lambda p, x: x * (1.0 + p["g"]) + p["b"]),
    Piece("slices", {"w": (2, 3, 4)}, lambda p, x: jnp.tanh(x @ p["w"][0, :, 1:]) @ p["w"][1, :, ::2][:, :1] + x),
    Piece("masked", {"w": SQUARE}, lambda p, x: jnp.tanh(x @ jnp.tril(p["w"]))),
    Piece("recurrent", {"u": SQUARE, "w": SQUARE, "b": (WIDTH,)}, _scan),
    Piece("attention", {"w": (3, 9)}, _attention),
    Piece("depthwise convolution", {"k": (2, 1, 3), "b": (WIDTH,)}, _convolution),
)
WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "vmap": lambda f: lambda p, x: jax.vmap(lambda row: f(p, row[None])[0])(x),
    "twice in a scan": lambda f: lambda p, x: lax.scan(lambda h, _: (f(p, h), None), x, length=2)[0],
}
LAYERS = st.tuples(st.sampled_from(PIECES), st.sampled_from(sorted(WRAPPERS)), st.sampled_from([0, 1, 2]))


@settings(max_examples=5, deadline=None, derandomize=True, database=None)
@given(st.lists(LAYERS, min_size=2, max_size=3), st.integers(0, 1000))
def test_rows_and_gram_of_random_models(layers: list[tuple[Piece, str, int]], seed: int) -> None:
    """Layers of the same piece with the same number share their weights."""
    rng = np.random.default_rng(seed)
    params = {
        f"{piece} {number}": {k: jnp.array(0.6 * rng.standard_normal(s)) for k, s in piece.shapes.items()}
        for piece, _, number in layers
    }

    def predict(p: Any, x: jax.Array) -> jax.Array:
        for piece, wrapper, number in layers:
            x = WRAPPERS[wrapper](piece.apply)(p[f"{piece} {number}"], x)
        return x[..., :2]

    found = study(predict, params, jnp.array(rng.standard_normal((3, TIME, WIDTH))))
    close(found.made["rows"], found.jacobian, 1e-10)
    close(found.made["gram"], found.jacobian @ found.jacobian.T, 1e-10)
    close(found.made["squares"], np.square(found.jacobian).sum(0), 1e-10)
    close(found.made["norms"], np.square(found.jacobian).sum(1), 1e-10)
