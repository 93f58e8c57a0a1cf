"""The operands of the ops on a linear softmax head: arrays that fit each other, rows on one axis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from curvax.kernels._dispatch import Request
from curvax.kernels._operands import arrays, row_weights
from curvax.kernels.linear_softmax_hvp.blocks import Cotangents, Head, LogitBlocks, Tangent
from curvax.tree import accumulation_dtype

MAX_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Operands:
    """A head and its rows.

    Attributes:
      op: name, for errors.
      shape: of hidden as it was passed.
      at: the head, with hidden (rows, features).
      weight: (rows,), in the accumulation dtype.
      max_bytes: for a block.
    """

    op: str
    shape: tuple[int, ...]
    at: Head
    weight: jax.Array
    max_bytes: int

    @staticmethod
    def of(op: str, hidden: Any, head: Any, bias: Any, weights: Any, max_bytes: int) -> Operands:
        """Checks and flattens; raises TypeError or ValueError for what does not fit."""
        at = Head(*arrays(hidden, head, bias))
        _check(op, at, max_bytes)
        shape = at.hidden.shape
        weight = row_weights(op, weights, shape[:-1]).astype(accumulation_dtype(at.hidden.dtype)).reshape(-1)
        return Operands(op, shape, at._replace(hidden=at.hidden.reshape(weight.size, shape[-1])), weight, max_bytes)

    @property
    def rows(self) -> int:
        """How many."""
        return self.weight.size

    @property
    def blocks(self) -> LogitBlocks:
        """The blocks within `max_bytes`."""
        return LogitBlocks.of(self.rows, self.at.head.shape[1], self.max_bytes)

    def request(self) -> Request:
        """What a variant's probe may look at: a block of logits."""
        return block_request(self.rows, self.at.head, self.max_bytes)

    def tangent(self, given: Any) -> Tangent:
        """The tangent with rows on one axis; raises if it is not like the head."""
        tangent = Tangent(*arrays(*given))
        for name, value, other in zip(Head._fields, self.at, tangent, strict=True):
            if other is None:
                continue
            if value is None:
                raise ValueError(f"{self.op}: there is a d_bias and no bias: pass both or neither")
            shape = self.shape if name == "hidden" else value.shape
            if (other.shape, other.dtype) != (shape, value.dtype):
                raise TypeError(
                    f"{self.op}: d_{name} is {other.dtype}{other.shape} and {name} {value.dtype}{shape}: "
                    "pass them alike"
                )
        if tangent.hidden is not None:
            tangent = tangent._replace(hidden=tangent.hidden.reshape(self.at.hidden.shape))
        return tangent

    def zero(self, parts: Head | Tangent) -> Cotangents:
        """Cotangents of no rows, of the parts that are there."""
        pairs = zip(self.at, parts, strict=True)
        accumulation = self.weight.dtype
        return self.shaped(
            Cotangents(*(None if x is None or p is None else jnp.zeros(x.shape, accumulation) for x, p in pairs))
        )

    def shaped(self, parts: Cotangents) -> Cotangents:
        """With the axes that hidden came with."""
        return parts if parts.hidden is None else parts._replace(hidden=parts.hidden.reshape(self.shape))


def block_request(rows: int, head: Any, max_bytes: int = MAX_BYTES) -> Request:
    """The request of an op on `rows` rows of such a head (an array or a shape): one block of logits."""
    columns = head.shape[1]
    blocks = LogitBlocks.of(max(rows, 1), columns, max_bytes)
    return Request.of(jax.ShapeDtypeStruct((blocks.rows, columns), accumulation_dtype(head.dtype)))


def _check(op: str, at: Head, max_bytes: int) -> None:
    if not jnp.issubdtype(at.hidden.dtype, jnp.floating):
        raise TypeError(f"{op}: hidden is of dtype {at.hidden.dtype}: pass real floating-point numbers")
    if max_bytes < 1:
        raise ValueError(f"{op}: max_bytes is {max_bytes}: pass a positive number of bytes")
    if at.hidden.ndim < 1 or at.head.ndim != 2 or at.hidden.shape[-1] != at.head.shape[0] or at.head.shape[1] == 0:
        raise ValueError(
            f"{op}: hidden has shape {at.hidden.shape} and head {at.head.shape}: "
            "pass (..., features) and (features, columns)"
        )
    for name, value in zip(Head._fields, at, strict=True):
        if value is not None and value.dtype != at.hidden.dtype:
            raise TypeError(f"{op}: {name} is of dtype {value.dtype} and hidden of {at.hidden.dtype}: cast one of them")
    if at.bias is not None and at.bias.shape != at.head.shape[1:]:
        raise ValueError(f"{op}: bias has shape {at.bias.shape}: pass {at.head.shape[1:]}, one entry per column")
