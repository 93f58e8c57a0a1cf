"""Every kind of model whose structure is recognized, tiny: what it computes, and the rule expected for each leaf.

All take a batch of examples and strict dtype promotion. Expected rules are stated, not derived: where a change of the
recognition changes one, that is either a gain to be written down there or a loss. A file holds a family of models.
"""

from tests.structure.zoo import (
    arrangement,
    attention,
    calls,
    complex_numbers,
    convolution,
    dense,
    embedding,
    frameworks,
    normalization,
    physics,
    scan,
    several_parts,
)
from tests.structure.zoo.entry import ZOO, Entry, paths

__all__ = [
    "ZOO",
    "Entry",
    "arrangement",
    "attention",
    "calls",
    "complex_numbers",
    "convolution",
    "dense",
    "embedding",
    "frameworks",
    "normalization",
    "paths",
    "physics",
    "scan",
    "several_parts",
]
