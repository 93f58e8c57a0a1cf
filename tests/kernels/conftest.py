"""Fixtures of the tests of ops."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import pytest


@pytest.fixture(params=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> Any:
    """Either dtype that every implementation takes, with 64-bit types where it needs them."""
    if request.param == "float64":
        request.getfixturevalue("x64")
    return jnp.dtype(request.param)
