"""Tables looked up by integers, alone and tied to a product."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from tests.structure.zoo.entry import Predict, bias, dense, embedding, model, normalize, scale, tied

TABLE = dict(e=embedding(4, 3), w=dense(3, 2))


@model("table", (2,), TABLE, high=4)
@model("table, indices out of range", (4,), TABLE, low=-6, high=7)
def indexed_table(p: Any, tokens: jax.Array) -> jax.Array:
    return jnp.tanh(p["e"][tokens]) @ p["w"]


def table(**options: Any) -> Predict:
    def predict(p: Any, tokens: jax.Array) -> jax.Array:
        rows = jnp.take(p["e"], tokens, axis=0, **options)
        # What is filled is NaN: it is none of the table's business.
        return jnp.tanh(jnp.nan_to_num(jnp.sum(rows, 1))) @ p["w"]

    return predict


model("table, filled", (4,), TABLE, low=-6, high=7)(table(mode="fill"))
model("table, filled with zero", (4,), TABLE, low=-6, high=7)(table(mode="fill", fill_value=0))
model("table, clipped", (4,), TABLE, low=-6, high=7)(table(mode="clip"))
model("table, wrapped", (4,), TABLE, low=-6, high=7)(table(mode="wrap"))


@model("tied table", (2,), dict(e=tied(4, 3), b=bias(4)), high=4)
def tied_table(p: Any, tokens: jax.Array) -> jax.Array:
    return jnp.tanh(p["e"][tokens]) @ p["e"].T + p["b"]


@model("one-hot table", (2,), dict(e=dense(4, 3), w=dense(3, 2)), high=4)
def one_hot(p: Any, tokens: jax.Array) -> jax.Array:
    return jnp.tanh(jax.nn.one_hot(tokens, 4, dtype=p["e"].dtype) @ p["e"]) @ p["w"]


@model("two tables", (2,), dict(e=embedding(4, 3), s=embedding(2, 3), pos=bias(2, 3), g=scale(3)), high=4)
def two_tables(p: Any, tokens: jax.Array) -> jax.Array:
    segments = (tokens > 1).astype(jnp.int32)
    return normalize(p["e"][tokens] + p["s"][segments] + p["pos"]) * p["g"]


@model("scaled tables", (3,), dict(e=embedding(4, 3), s=embedding(4, 3)), high=4)
def scaled_table(p: Any, tokens: jax.Array) -> jax.Array:
    return jnp.sum(jnp.tanh((p["e"] * 3.0)[tokens]), 1) + (p["s"] / 2.0)[tokens[:, 0]]
