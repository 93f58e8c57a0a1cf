"""Random keys from outside."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def check_key(name: str, key: Any) -> None:
    """Raises TypeError for what is no single random key, typed or raw, traced or not."""
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    if dtype is None or shape is None:
        kind = f"a {type(key).__name__}"
    elif jnp.issubdtype(dtype, jax.dtypes.prng_key):
        kind = None if shape == () else f"an array of keys {list(shape)}"
    else:
        raw = dtype == jnp.uint32 and len(shape) == 1 and shape[0] > 0
        kind = None if raw else f"an array of {dtype}{list(shape)}"
    if kind is not None:
        raise TypeError(f"{name} must be a random key such as jax.random.key(0), not {kind}.")
