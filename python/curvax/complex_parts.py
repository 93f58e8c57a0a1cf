"""Complex numbers as pairs of real ones: what curvax differentiates is real.

A real function of z = a + i b has the gradient (dL/da, dL/db), and curvature in the same 2 n real numbers, whether what
lies between is holomorphic or not. For a holomorphic model f with rows O = df/dz the real rows are those of Re f and
Im f; their Gauss-Newton system has the solution of the complex one, (O^H O + lam I) s = O^H r with s = s_a + i s_b:

    f(z) = 2 i z, one example      O = 2 i      complex: (4 + lam) s = -2 i r
    Re f = -2 b, Im f = 2 a        rows (0, -2), (2, 0)      real: (4 + lam) s_a = 2 Im r, (4 + lam) s_b = -2 Re r
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from curvax.tree import PyTree


class ComplexParts(NamedTuple):
    """A complex leaf of the parameters as two real leaves of its shape."""

    real: Any
    imag: Any


def is_complex(x: Any) -> bool:
    """Whether `x` is a complex array, or the shape and dtype of one."""
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.complexfloating)


def split_complex(tree: PyTree) -> PyTree:
    """The tree with `ComplexParts` in the place of every complex leaf (arrays or `jax.ShapeDtypeStruct`s)."""

    def one(x: Any) -> Any:
        if not is_complex(x):
            return x
        if isinstance(x, jax.ShapeDtypeStruct):
            part = jax.ShapeDtypeStruct(x.shape, jnp.finfo(x.dtype).dtype)
            return ComplexParts(part, part)
        return ComplexParts(jnp.real(x), jnp.imag(x))

    return jax.tree.map(one, tree)


def join_complex(tree: PyTree) -> PyTree:
    """Inverse of `split_complex`, for arrays."""
    return jax.tree.map(lambda x: jax.lax.complex(x.real, x.imag) if is_parts(x) else x, tree, is_leaf=is_parts)


def is_parts(x: Any) -> bool:
    """Whether `x` is a complex leaf in parts."""
    return isinstance(x, ComplexParts)


def real_view(x: Any) -> Any:
    """Complex outputs or targets as real ones with twice as many entries of the last axis; others as they are.

    Args:
      x: an array of shape (B,) or (B, ..., K).

    Returns:
      (B, 2) or (B, ..., 2 K), real parts before imaginary ones; |x|^2 is the sum of the squares.
    """
    if not is_complex(x):
        return x
    if x.ndim == 1:
        return jnp.stack([x.real, x.imag], axis=-1)
    return jnp.concatenate([x.real, x.imag], axis=-1)
