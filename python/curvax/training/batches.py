"""Where a run's batches come from, and how many of them one compiled chunk of steps takes at once.

one batch           repeated: the chunk holds it, nothing moves
Minibatches         the data stay on the device; the chunk gets row numbers (steps, size)
Sampler             the chunk draws every batch itself, from the parameters as they are
list, callable,     read on the host; small batches of equal shapes are stacked (steps, ...), others go one by one
loader, iterator
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, final

import jax
import jax.numpy as jnp
import numpy as np

from curvax.tree import PyTree

_MOST_STEPS = 4096
"""Of a chunk: what it reports of its steps has so many entries."""
_MOST_STACKED, _STACKED_BYTES = 256, 8 << 20
"""Bounds on batches that are stacked: copying 8 MiB takes about a millisecond."""
_DRAWS = np.uint32(0x7FFFFFFF)
"""Folded into the key for what a sampler draws: no step has this number, and methods fold in their step's."""

Draw = Callable[[jax.Array, PyTree, PyTree], tuple[Any, PyTree]]


@final
@dataclasses.dataclass(frozen=True)
class Minibatches:
    """Minibatches of data in memory: epoch after epoch, each in a fresh order, without the incomplete last one.

    The data stay on the device and the rows are taken there. Step i of a seed always has the same rows.

    Attributes:
      data: pytree of arrays with the examples on the first axis of each.
      size: examples of a batch.
      seed: of the orders.
    """

    data: Any
    size: int
    seed: int = 0

    def __post_init__(self) -> None:
        counts = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(self.data)}
        if len(counts) != 1 or () in counts:
            raise ValueError("Minibatches need the examples on the first axis of every leaf of data, equally many.")
        ((examples,),) = counts
        if not 1 <= self.size <= examples:
            raise ValueError(f"size must be from 1 to {examples}, the examples there are, not {self.size}.")

    def rows(self, first: int, count: int) -> np.ndarray:
        """Row numbers (count, size) of the steps from `first` on."""
        examples = np.shape(jax.tree.leaves(self.data)[0])[0]
        in_epoch = examples // self.size
        epochs = range(first // in_epoch, -(-(first + count) // in_epoch))
        orders = [np.random.default_rng((self.seed, e)).permutation(examples)[: in_epoch * self.size] for e in epochs]
        start = first - epochs.start * in_epoch
        return np.concatenate(orders).reshape(-1, self.size)[start : start + count].astype(np.int32)


@final
@dataclasses.dataclass(frozen=True)
class Sampler:
    """Batches that are drawn from the parameters as they are, on the device, with something carried along.

    Metropolis walkers of variational Monte Carlo are what is carried; collocation points that are drawn afresh carry
    nothing. It is traced: every draw runs inside the compiled chunk.

        def draw(key, params, walkers):
            walkers = metropolis(log_psi, params, walkers, key, moves=20)
            return {"x": walkers, "y": local_energies(params, walkers)}, walkers

        curvax.fit(method, params, Sampler(draw, start=walkers), 300, rng=jax.random.key(0))

    Attributes:
      draw: (key, params, carried) -> (batch, carried).
      start: what is carried into the first draw.
    """

    draw: Draw
    start: PyTree = ()


class Taken(NamedTuple):
    """What a chunk gets.

    Attributes:
      entries: one entry for each step on the first axis, or a batch, or `None`; arrays.
      count: steps that they are enough for; 0 at the end of the batches.
    """

    entries: Any
    count: int


DrawInside = Callable[[tuple[Any, Any], PyTree, PyTree, jax.Array | None], tuple[Any, PyTree]]
"""((shared, entry), carried, parameters, key) -> (batch, carried); equal functions share a compiled program."""


class Source(abc.ABC):
    """Batches as a chunk takes them: `take` on the host, `draw` inside the compiled chunk.

    Attributes:
      draw: makes the batch of one step from what is shared and its entry.
      shared: arrays that all chunks read.
      start: what is carried from draw to draw.
      capacity: most steps of a chunk.
      stacked: whether `entries` have one for each step.
    """

    draw: DrawInside
    shared: Any = ()
    start: PyTree = ()
    capacity: int = _MOST_STEPS
    stacked: bool = False

    @abc.abstractmethod
    def take(self, first: int, count: int) -> Taken:
        """What the steps from number `first` on need, for at most `count` of them."""

    def skip(self, count: int) -> None:
        """Passes over the batches of a run that goes on from a checkpoint; nothing where the step number tells them."""
        del count


class _Repeated(Source):
    def __init__(self, batch: Any) -> None:
        self.draw, self.shared = _draw_shared, jax.tree.map(jnp.asarray, batch)

    def take(self, first: int, count: int) -> Taken:
        return Taken((), count)


class _Rows(Source):
    stacked = True

    def __init__(self, batches: Minibatches) -> None:
        self.draw, self._batches, self.shared = _draw_rows, batches, jax.tree.map(jnp.asarray, batches.data)
        self.capacity = max(min(_MOST_STEPS, _STACKED_BYTES // (4 * batches.size)), 1)

    def take(self, first: int, count: int) -> Taken:
        rows = np.zeros((self.capacity, self._batches.size), np.int32)
        rows[:count] = self._batches.rows(first, count)
        return Taken(rows, count)


class _Drawn(Source):
    def __init__(self, sampler: Sampler) -> None:
        self.draw, self.start = _DrawBySampler(sampler.draw), jax.tree.map(jnp.asarray, sampler.start)

    def take(self, first: int, count: int) -> Taken:
        return Taken((), count)


class _Read(Source):
    """Batches that Python makes, one for each step."""

    def __init__(self, reader: _Reader) -> None:
        self.draw, self._reader, self._ahead = _draw_entry, reader, reader.read(None)
        if self._ahead is None:
            raise ValueError("there are no batches: the iterator is empty.")
        self.capacity = _stackable(self._ahead)
        self.stacked = self.capacity > 1

    def take(self, first: int, count: int) -> Taken:
        batches: list[Any] = []
        while len(batches) < min(count, self.capacity):
            batch, self._ahead = self._ahead, None
            if batch is None:
                batch = self._reader.read(first + len(batches))
            if batch is None or (batches and _form(batch) != _form(batches[0])):
                # Another shape begins the next chunk.
                self._ahead = batch
                break
            batches.append(batch)
        if not self.stacked or not batches:
            return Taken(jax.tree.map(jnp.asarray, batches[0]) if batches else None, len(batches))
        return Taken(jax.tree.map(self._stack, *batches), len(batches))

    def _stack(self, *leaves: Any) -> np.ndarray:
        first = np.asarray(leaves[0])
        together = np.zeros((self.capacity, *first.shape), first.dtype)
        for row, leaf in zip(together, leaves, strict=False):
            row[...] = leaf
        return together

    def skip(self, count: int) -> None:
        self._ahead = self._reader.skip(count, self._ahead)


def _draw_shared(given: tuple[Any, Any], carried: PyTree, params: PyTree, key: jax.Array | None) -> tuple[Any, Any]:
    return given[0], carried


def _draw_rows(given: tuple[Any, Any], carried: PyTree, params: PyTree, key: jax.Array | None) -> tuple[Any, Any]:
    data, rows = given
    return jax.tree.map(lambda leaf: leaf[rows], data), carried


def _draw_entry(given: tuple[Any, Any], carried: PyTree, params: PyTree, key: jax.Array | None) -> tuple[Any, Any]:
    return given[1], carried


@dataclasses.dataclass(frozen=True)
class _DrawBySampler:
    draw: Draw

    def __call__(
        self, given: tuple[Any, Any], carried: PyTree, params: PyTree, key: jax.Array | None
    ) -> tuple[Any, Any]:
        if key is None:
            raise ValueError("a Sampler draws at random: pass rng=jax.random.key(0), say.")
        return self.draw(key, params, carried)


class _Reader(abc.ABC):
    """One batch after another."""

    @abc.abstractmethod
    def read(self, step: int | None) -> Any:
        """The batch of a step, `None` behind the last one; of the first step to come for `None`, to see its shapes."""

    @abc.abstractmethod
    def skip(self, count: int, ahead: Any) -> Any:
        """Passes over `count` batches, of which `ahead` is the first; returns the one that is ahead then, if any."""


class _ByStep(_Reader):
    def __init__(self, function: Callable[[int], Any], first: int) -> None:
        self._function, self._first = function, first

    def read(self, step: int | None) -> Any:
        return self._function(self._first if step is None else step)

    def skip(self, count: int, ahead: Any) -> Any:
        return None if count else ahead


class _InOrder(_Reader):
    """A loader begins anew where it ends; an iterator, which cannot, is at its end."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches, self._iterator, self._epoch = batches, iter(batches), 0

    def read(self, step: int | None) -> Any:
        try:
            batch = next(self._iterator)
        except StopIteration:
            if isinstance(self._batches, Iterator) or self._epoch == 0:
                return None
            self._iterator, self._epoch = iter(self._batches), 0
            return self.read(step)
        self._epoch += 1
        return batch

    def skip(self, count: int, ahead: Any) -> Any:
        for _ in range(count):
            ahead = self.read(None)
        return ahead


def source_of(batches: Any, first: int) -> Source:
    """The source behind what a user passes as `batches`.

    Args:
      batches: as for `fit`.
      first: number of the first step.

    Raises:
      TypeError: nothing that batches could come from.
      ValueError: there are no batches in it.
    """
    if isinstance(batches, Minibatches):
        return _Rows(batches)
    if isinstance(batches, Sampler):
        return _Drawn(batches)
    if _is_batch(batches):
        return _Repeated(batches)
    if callable(batches):
        return _Read(_ByStep(batches, first))
    if isinstance(batches, Sequence) and not isinstance(batches, str | bytes):
        if not batches:
            raise ValueError("there are no batches: the sequence is empty.")
        return _Read(_ByStep(lambda step: batches[step % len(batches)], first))
    if isinstance(batches, Iterable):
        return _Read(_InOrder(batches))
    raise TypeError(
        f"batches is a {type(batches).__name__}: pass a batch, a list of batches, a loader, a function step -> batch, "
        "Minibatches(...) or Sampler(...)."
    )


def draw_key(rng: jax.Array | None, step: jax.Array) -> jax.Array | None:
    """The key of a sampler's draw before step number `step`; independent of what the step itself draws."""
    return None if rng is None else jax.random.fold_in(jax.random.fold_in(rng, _DRAWS), step)


def _is_batch(batches: Any) -> bool:
    """A mapping, an array, a tuple of arrays or mappings of arrays, a registered dataclass."""
    if isinstance(batches, Mapping) or _is_array(batches):
        return True
    if isinstance(batches, tuple):
        return bool(batches) and all(_is_array(leaf) for leaf in batches)
    known = not jax.tree_util.all_leaves([batches])
    return known and not isinstance(batches, Sequence | Iterator)


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray)


def _form(batch: Any) -> Any:
    leaves, structure = jax.tree.flatten(batch)
    return structure, [(np.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]


def _stackable(batch: Any) -> int:
    """How many such batches to stack; 1 for large ones and for arrays that live on an accelerator."""
    leaves = jax.tree.leaves(batch)
    if any(isinstance(leaf, jax.Array) and not _on_the_host(leaf) for leaf in leaves):
        return 1
    size = sum(np.asarray(leaf).nbytes for leaf in leaves)
    return int(max(min(_STACKED_BYTES // max(size, 1), _MOST_STACKED), 1))


def _on_the_host(leaf: jax.Array) -> bool:
    numbers = not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return numbers and len(leaf.devices()) == 1 and next(iter(leaf.devices())).platform == "cpu"
