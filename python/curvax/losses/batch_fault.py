"""What can be wrong with the values of a batch: refused where they are at hand, reported where not."""

from __future__ import annotations

import enum
from typing import Any

import jax
from jax.core import Tracer


class BatchFault(enum.IntEnum):
    """What is wrong with the values of a batch. Stored in `info` as int32; `describe` gives the sentence.

    A step on such a batch is not taken: its loss is not a number.
    """

    NONE = 0
    NEGATIVE_WEIGHT = 1
    LABEL_OUT_OF_RANGE = 2
    NO_SAMPLES = 3

    def describe(self) -> str:
        """What is wrong and what to do about it."""
        return _SENTENCES[self]


_SENTENCES = {
    BatchFault.NONE: "Nothing is wrong with the batch.",
    BatchFault.NEGATIVE_WEIGHT: "A weight is negative or not a number, and curvature with such weights is no longer "
    "positive: give the curvature weights that are not negative, and hand the gradient of the signed loss in as the "
    "updates of curvax.transforms.scale_by_ggn (or another scale_by_*).",
    BatchFault.LABEL_OUT_OF_RANGE: "A label that counts is not in 0 .. classes - 1: give such positions weight zero by "
    "weight_key, or name their label by SoftmaxCrossEntropy(ignore_index=).",
    BatchFault.NO_SAMPLES: "All samples have weight zero, and an energy is a mean over samples: give at least one of "
    "them a positive weight.",
}


def at_hand(values: Any) -> bool:
    """Whether all arrays of a tree can be read now: none is traced, a shape, or spread over other hosts."""
    return all(
        not isinstance(x, Tracer | jax.ShapeDtypeStruct) and getattr(x, "is_fully_addressable", True)
        for x in jax.tree.leaves(values)
    )


def refuse(fault: jax.Array, extent: str) -> None:
    """Raises ValueError for a fault whose code can be read.

    Args:
      fault: the code.
      extent: what the values are, in a few words.
    """
    if at_hand(fault) and int(fault) != BatchFault.NONE:
        raise ValueError(f"{BatchFault(int(fault)).describe()[:-1]} ({extent}).")
