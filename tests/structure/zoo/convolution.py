"""Convolutions of one to three dimensions: strides, padding, dilation, groups, layouts, pooling."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.structure.zoo.entry import Predict, bias, convolution, dense, flat, model

NHWC = ("NHWC", "HWIO", "NHWC")


def _sum(x: jax.Array) -> jax.Array:
    """A few outputs from many entries: fixed, different weights."""
    x = flat(x)
    return x @ jnp.asarray(np.cos(np.arange(x.shape[1] * 3.0)).reshape(x.shape[1], 3), x.dtype)


@model(
    "strides, dilation, groups",
    (5, 3, 2),
    dict(k=convolution(2, 2, 2, 4), b=bias(4), l=convolution(2, 1, 2, 4), c=bias(4), w=dense(32, 2)),
)
def cnn(p: Any, x: jax.Array) -> jax.Array:
    x = lax.conv_general_dilated(x, p["k"], (2, 1), "SAME", dimension_numbers=NHWC) + p["b"]
    x = lax.conv_general_dilated(
        jnp.tanh(x),
        p["l"],
        (1, 2),
        ((1, 2), (0, 1)),
        rhs_dilation=(2, 1),
        dimension_numbers=NHWC,
        feature_group_count=2,
    )
    return flat(jnp.tanh(x + p["c"])) @ p["w"]


def layer(strides: Any, padding: Any, numbers: Any, **options: Any) -> Predict:
    def predict(p: Any, x: jax.Array) -> jax.Array:
        bias = p["b"].reshape(tuple(-1 if a == "C" else 1 for a in numbers[2]))
        y = lax.conv_general_dilated(x, p["k"], strides, padding, dimension_numbers=numbers, **options)
        return _sum(jnp.tanh(y + bias))

    return predict


model("depthwise convolution", (3, 3, 3), dict(k=convolution(2, 2, 1, 6), b=bias(6)))(
    layer((1, 1), "SAME", NHWC, feature_group_count=3)
)
model("convolution over time", (6, 2), dict(k=convolution(2, 2, 3), b=bias(3)))(
    layer((2,), "VALID", ("NWC", "WIO", "NWC"), rhs_dilation=(2,))
)
model("causal convolution, channels first", (2, 4), dict(k=convolution(3, 2, 3), b=bias(3)))(
    layer((1,), [(2, 0)], ("NCW", "OIW", "NCW"))
)
model("convolution in three dimensions", (2, 3, 2, 1), dict(k=convolution(2, 1, 2, 1, 2), b=bias(2)))(
    layer((1, 2, 1), "SAME", ("NDHWC", "DHWIO", "NDHWC"))
)
model("channels first, negative padding", (2, 4, 3), dict(k=convolution(3, 2, 2, 2), b=bias(3)))(
    layer((1, 1), ((1, -1), (0, 1)), ("NCHW", "OIHW", "NCHW"))
)


@model("transposed convolution", (2, 3, 2), dict(k=convolution(3, 2, 2, 3), b=bias(3)))
def transposed(p: Any, x: jax.Array) -> jax.Array:
    y = lax.conv_transpose(x, p["k"], (2, 2), "SAME", dimension_numbers=NHWC)
    return _sum(jnp.tanh(y + p["b"]))


@model("transposed kernel", (2, 3, 2), dict(k=convolution(3, 2, 3, 2)))
def transposed_kernel(p: Any, x: jax.Array) -> jax.Array:
    return _sum(lax.conv_transpose(x, p["k"], (2, 1), "VALID", dimension_numbers=NHWC, transpose_kernel=True))


def pooled(kind: str) -> Predict:
    def predict(p: Any, x: jax.Array) -> jax.Array:
        y = jnp.tanh(lax.conv_general_dilated(x, p["k"], (1, 1), "VALID", dimension_numbers=NHWC) + p["b"])
        window, strides = (1, 2, 2, 1), (1, 2, 1, 1)
        if kind == "max":
            y = lax.reduce_window(y, -jnp.inf, lax.max, window, strides, "SAME")
        else:
            y = lax.reduce_window(y, 0.0, lax.add, window, strides, "VALID") / 4.0
        return jnp.mean(y, (1, 2)) @ p["w"]

    return predict


POOLED = dict(k=convolution(2, 2, 2, 3), b=bias(3), w=dense(3, 2))
model("max pooling", (4, 4, 2), POOLED)(pooled("max"))
model("average pooling", (4, 4, 2), POOLED)(pooled("mean"))
