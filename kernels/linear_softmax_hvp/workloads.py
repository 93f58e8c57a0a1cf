"""Named heads for the tests and benchmarks of linear_softmax_hvp."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """A linear softmax head.

    Attributes:
      name: as benchmarks print it.
      rows: tokens.
      features: of the hidden state.
      columns: vocabulary.
      max_bytes: for a block of logits.
      note: where such a head comes from.
    """

    name: str
    rows: int
    features: int
    columns: int
    max_bytes: int
    note: str


WORKLOADS = (
    Workload("classes_1k", 1024, 128, 1000, 2**22, "a classifier of a thousand classes"),
    Workload("tokens_32k", 1024, 256, 32_768, 2**26, "a small language model, vocabulary a power of two"),
    Workload("tokens_50k", 2048, 128, 50_257, 2**26, "GPT-2's vocabulary, an odd number"),
    Workload("columns_cut", 512, 128, 50_257, 2**23, "less memory than 16 rows of logits take"),
)
