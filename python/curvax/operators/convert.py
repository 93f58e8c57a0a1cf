"""Operators for other libraries: SciPy's sparse linear algebra, lineax."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvax.operators.base import LinearOperator


def as_scipy(operator: LinearOperator) -> Any:
    """A `scipy.sparse.linalg.LinearOperator` on flat vectors, for `eigsh`, `cg`, `svds`, ....

    Each product is one call of a compiled program; matrices are multiplied in one.
    """
    # Its stubs know the class alone, whose constructor makes another one of functions.
    from scipy.sparse.linalg import LinearOperator as ScipyOperator

    transposed = operator.transpose()

    def multiply(by: LinearOperator, v: np.ndarray) -> np.ndarray:
        return np.asarray(by @ jnp.asarray(v, by.dtype))

    def vector(by: LinearOperator) -> Any:
        # SciPy's word for a vector is also a matrix of one column.
        return lambda v: multiply(by, v.reshape(-1))

    make: Any = ScipyOperator
    return make(
        operator.shape,
        matvec=vector(operator),
        rmatvec=vector(transposed),
        matmat=lambda v: multiply(operator, v),
        rmatmat=lambda v: multiply(transposed, v),
        dtype=operator.dtype,
    )


def as_lineax(operator: LinearOperator) -> Any:
    """A `lineax.FunctionLinearOperator` on trees, tagged as what the operator says of itself.

    Raises:
      ImportError: lineax is not installed.
    """
    try:
        import lineax as lx
    except ImportError as error:
        raise ImportError("as_lineax needs lineax: pip install 'curvax[lineax]'.") from error
    tags: list[object] = [lx.symmetric_tag] if operator.is_symmetric else []
    tags += [lx.positive_semidefinite_tag] if operator.is_positive else []
    structure = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), operator.domain)
    return lx.FunctionLinearOperator(operator.linearized(), structure, frozenset(tags))
