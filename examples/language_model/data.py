"""English text that every machine with CPython has: the topics of `help()`, as bytes."""

from __future__ import annotations

import dataclasses
import pydoc_data.topics
from pathlib import Path

import numpy as np


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Bytes for training, and others for testing."""

    train: np.ndarray
    test: np.ndarray

    def batch(self, rng: np.random.Generator, sequences: int, length: int) -> dict[str, np.ndarray]:
        """Random stretches: inputs "x" and the bytes that follow, "y", both (sequences, length) int32."""
        return _cut(self.train, rng.integers(0, self.train.size - length - 1, sequences), length)

    def held_out(self, sequences: int, length: int) -> dict[str, np.ndarray]:
        """The same stretches every time, evenly spread over the test bytes."""
        return _cut(self.test, np.linspace(0, self.test.size - length - 1, sequences).astype(np.int64), length)


def load(path: Path | None = None) -> Corpus:
    """The corpus: 465,000 characters from Python's documentation, or a text file; every tenth piece is for testing.

    Args:
      path: a text file to take instead, such as one of a Debian package of books.
    """
    topics = pydoc_data.topics.topics
    text = path.read_bytes() if path is not None else "\n".join(topics[name] for name in sorted(topics)).encode()
    values = np.frombuffer(text, np.uint8).astype(np.int32)
    pieces = np.array_split(values, 100)
    test = np.concatenate(pieces[9::10])
    return Corpus(np.concatenate([p for i, p in enumerate(pieces) if i % 10 != 9]), test)


def _cut(values: np.ndarray, starts: np.ndarray, length: int) -> dict[str, np.ndarray]:
    stretches = values[starts[:, None] + np.arange(length + 1)]
    return {"x": stretches[:, :-1], "y": stretches[:, 1:]}
