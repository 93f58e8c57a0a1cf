"""What a model may return."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from curvax.tree import PyTree


def check_outputs(outputs: Any, beside: str = "") -> jax.Array:
    """The outputs; TypeError if they are no floating-point array. `beside` is the mend for a tuple of other things."""
    if hasattr(outputs, "dtype") and jnp.issubdtype(outputs.dtype, jnp.floating) and outputs.ndim >= 1:
        return outputs
    array = hasattr(outputs, "dtype") and hasattr(outputs, "shape")
    got = f"{outputs.dtype}{list(outputs.shape)}" if array else f"a {type(outputs).__name__}"
    mend = "" if array else ": concatenate several outputs along their last axis, and let the loss take them apart"
    raise TypeError(
        "predict_fn must return one floating-point array with a leading example axis, and it returned "
        f"{got}{mend}{beside if isinstance(outputs, tuple) else ''}."
    )


def check_model(predict: Callable[[PyTree, Any], jax.Array], params: PyTree, inputs: Any) -> None:
    """`check_outputs` of a model, from shapes alone."""
    check_outputs(jax.eval_shape(predict, params, inputs))
