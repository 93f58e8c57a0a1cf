"""Named rows for the tests and benchmarks of softmax_hvp."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """Logits and tangents.

    Attributes:
      name: as benchmarks print it.
      rows: of logits.
      columns: classes.
      tangents: per row.
      note: where such rows come from.
      large: for machines with hundreds of gigabytes a second.
    """

    name: str
    rows: int
    columns: int
    tangents: int
    note: str
    large: bool = False


WORKLOADS = (
    Workload("digits", 4096, 10, 1, "a classifier of ten classes"),
    Workload("imagenet", 1024, 1000, 1, "a classifier of a thousand classes"),
    Workload("tokens_32k", 256, 32_768, 1, "a language model, vocabulary a power of two"),
    Workload("tokens_50k", 128, 50_257, 1, "GPT-2's vocabulary, an odd number"),
    Workload("tokens_131k", 64, 131_072, 1, "a language model with a large vocabulary"),
    Workload("tangents_4", 64, 32_768, 4, "four probes per row"),
    Workload("tokens_32k, large", 2048, 32_768, 1, "far beyond a GPU's caches", large=True),
    Workload("tokens_50k, large", 1024, 50_257, 1, "the same with an odd number of columns", large=True),
    Workload("tokens_131k, large", 512, 131_072, 1, "the same with a large vocabulary", large=True),
)
