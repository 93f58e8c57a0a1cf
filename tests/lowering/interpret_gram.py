"""Runs the Triton kernel of gram_accumulate in Triton's interpreter and prints the worst error of each case.

    TRITON_INTERPRET=1 python interpret_gram.py

By itself and not in a test, since Triton decides when it is imported whether it compiles or interprets. The error is in
roundings of float32 of the sum of magnitudes. The interpreter multiplies in full precision, so this shows that tiles,
groups, positions and masks are right, and says nothing about TF32.
"""

from __future__ import annotations

import json
from typing import Any

import jax
import numpy as np

from curvax.kernels.gram_accumulate import triton
from curvax.kernels.gram_accumulate.factors import Rows
from curvax.kernels.gram_accumulate.triton_kernel import gram_tile

# groups, rows per group, positions, in (None: explicit rows), out, groups of the other side (None: triangle).
CASES = (
    (1, 1, 1, 1, 1, None),
    (7, 3, 1, 5, 4, None),
    (70, 1, 1, 17, 9, None),
    (35, 2, 1, 40, 33, None),
    (70, 3, 1, 40, 33, None),
    (2, 150, 1, 3, 2, None),
    (13, 10, 1, 33, 65, None),
    (9, 10, 1, None, 37, None),
    (70, 1, 1, None, 37, None),
    (11, 2, 3, 40, 6, None),
    (35, 2, 1, 5, 33, 40),
    (11, 10, 2, 5, 33, 3),
)


class _Tensor:
    """As much of a tensor as the interpreter asks for, over a NumPy array, its own storage."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.dtype = str(array.dtype)

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> _Tensor:
        return self

    def cpu(self) -> _Tensor:
        return self

    def new_empty(self, size: int, device: str) -> _Tensor:
        return _Tensor(np.empty(size, self.array.dtype))

    def set_(self, storage: _Tensor, *layout: object) -> None:
        self.array = storage.array

    def copy_(self, other: _Tensor) -> None:
        """Nothing to do: device and host are one."""

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    def stride(self) -> tuple[int, ...]:
        return self.array.strides


def worst(
    groups: int, per_group: int, positions: int, into: int | None, out: int, others: int | None, batch: int
) -> float:
    """The largest error over the entries that are meant, in roundings."""
    rng = np.random.default_rng(0)

    def made(groups: int) -> Any:
        a: Any = None if into is None else rng.standard_normal((batch, groups, positions, into)).astype(np.float32)
        d: Any = rng.standard_normal((batch, groups, per_group, positions, out)).astype(np.float32)
        return Rows(a, d)

    left = made(groups)
    right = left if others is None else made(others)
    gram = rng.standard_normal((batch, groups * per_group, right.cotangents.shape[1] * per_group)).astype(np.float32)
    result = np.full_like(gram, np.nan)
    one_left, one_right = (jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), r) for r in (left, right))
    triangle = others is None
    shape = triton.tiling(one_left, (9, 0))
    arrays = [gram, left.activations, left.cotangents, right.activations, right.cotangents, result]
    tensors = [_Tensor(gram if x is None else x) for x in arrays]
    kernel: Any = gram_tile
    kernel[(triton.tiles(one_left, one_right, triangle, shape), batch)](
        *tensors, **triton.constants(one_left, one_right, triangle, shape)
    )
    error = 0.0
    for i in range(batch):
        (x, x_size), (y, y_size) = (_explicit(r, i) for r in (left, right))
        wanted = np.tril(np.ones_like(gram[i])) if triangle else np.ones_like(gram[i])
        off = np.abs(result[i].astype(np.float64) - gram[i] - x @ y.T)[wanted > 0]
        error = max(error, float(np.max(off / (np.abs(gram[i]) + x_size @ y_size.T)[wanted > 0])))
    return error / float(np.finfo(np.float32).eps)


def _explicit(rows: Any, member: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows in float64 and the sums of the magnitudes of their terms."""
    d = rows.cotangents[member].astype(np.float64)
    a = np.ones((*d.shape[:1], d.shape[2], 1)) if rows.activations is None else rows.activations[member]
    made = [np.einsum("bti,brto->brio", f(a.astype(np.float64)), f(d)) for f in (lambda x: x, np.abs)]
    return tuple(m.reshape(m.shape[0] * m.shape[1], -1) for m in made)  # pyright: ignore[reportReturnType]


if __name__ == "__main__":
    for number, case in enumerate(CASES):
        batch = 2 if number == 1 else 1
        print(json.dumps([case, worst(*case, batch)]), flush=True)
