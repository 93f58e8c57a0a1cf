"""A run on disk, through Orbax: saved every so many steps, and taken up again where it was, to the last bit.

A checkpoint is (1) all arrays that the run carries, in the order of their tree, (2) the history, (3) a few numbers. The
tree itself is not stored: it is that of the method and the parameters which `fit` is called with again.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from curvax.training.history import History
from curvax.tree import PyTree


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """Where and how often a run is saved; a run that finds a checkpoint in its folder goes on from there.

    Attributes:
      folder: of this run alone; made if it does not exist.
      every: steps between checkpoints; the end of the run has one too, however it came.
      keep: how many of the last are kept.
      resume: `False` refuses a folder with checkpoints in it.
    """

    folder: str | os.PathLike[str]
    every: int = 1000
    keep: int = 2
    resume: bool = True

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep < 1:
            raise ValueError(f"Checkpoints: every and keep must be at least 1, not {self.every} and {self.keep}.")


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """What a checkpoint has.

    Attributes:
      arrays: everything that the run carries, and its random key.
      history: so far.
      numbers: by name: steps done, value of the best evaluation.
    """

    arrays: PyTree
    history: History
    numbers: dict[str, float]


class Store:
    """The checkpoints of one run.

    Raises:
      ImportError: Orbax is not installed.
      ValueError: the folder has checkpoints and `resume` is false.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        try:
            import orbax.checkpoint as ocp
        except ImportError as error:
            raise ImportError("Checkpoints need Orbax: pip install 'curvax[fit]'.") from error
        self.folder = pathlib.Path(checkpoints.folder).absolute()
        # Saved before the next chunk begins: it may write into these very arrays.
        options = ocp.CheckpointManagerOptions(max_to_keep=checkpoints.keep, enable_async_checkpointing=False)
        handlers = {
            "arrays": ocp.StandardCheckpointHandler(),
            "record": ocp.StandardCheckpointHandler(),
            "numbers": ocp.JsonCheckpointHandler(),
        }
        self._ocp = ocp
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)
        if not checkpoints.resume and self.latest is not None:
            self.close()
            raise ValueError(f"{self.folder} has checkpoints already: set resume=True, or give another folder.")

    @property
    def latest(self) -> int | None:
        """Steps of the last checkpoint; `None` without one."""
        return self._manager.latest_step()

    def close(self) -> None:
        """Ends Orbax's part."""
        self._manager.close()

    def save(self, snapshot: Snapshot, step: int) -> None:
        """Writes a checkpoint after so many steps, unless there is one."""
        if self.latest is not None and self.latest >= step:
            return
        ocp, history = self._ocp, snapshot.history
        columns = {f"columns/{name}": x for name, x in history.columns.items()}
        columns |= {f"evaluations/{name}": x for name, x in history.evaluations.items()}
        record = {_file(name): x for name, x in columns.items()} | {"seconds": history.seconds}
        arguments = ocp.args.Composite(
            arrays=ocp.args.StandardSave({"none": np.zeros(1)} | _numbered(snapshot.arrays)),
            record=ocp.args.StandardSave({"none": np.zeros(1)} | {n: x for n, x in record.items() if x.size}),
            numbers=ocp.args.JsonSave(snapshot.numbers | {"compile_seconds": history.compile_seconds}),
        )
        self._manager.save(step, args=arguments)

    def restore(self, like: PyTree) -> Snapshot:
        """The last checkpoint, with arrays in the tree, with the dtypes and on the devices of `like`.

        Raises:
          ValueError: it is of another method or of other parameters.
        """
        ocp, step, targets = self._ocp, self.latest, _numbered(like)
        if step is None:
            raise ValueError(f"{self.folder} has no checkpoint.")
        self._check(targets, step)
        shapes = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for n, x in targets.items()}
        arguments = ocp.args.Composite(
            arrays=ocp.args.StandardRestore({"none": np.zeros(1)} | shapes),
            record=ocp.args.StandardRestore(),
            numbers=ocp.args.JsonRestore(),
        )
        restored = self._manager.restore(step, args=arguments)
        numbers = dict(restored["numbers"])
        history = _history(restored["record"], numbers.pop("compile_seconds"))
        return Snapshot(_in_tree(like, restored["arrays"]), history, numbers)

    def _check(self, targets: dict[str, jax.Array], step: int) -> None:
        stored = self._manager.item_metadata(step)["arrays"].tree
        mine = {n: (tuple(x.shape), str(x.dtype)) for n, x in targets.items()}
        theirs = {n: (tuple(x.shape), str(np.dtype(x.dtype))) for n, x in stored.items() if n != "none"}
        if mine != theirs:
            raise ValueError(
                f"the checkpoint in {self.folder} is of another method or of other parameters: give this run another "
                "folder, or call fit as it was called there."
            )


def _numbered(tree: PyTree) -> dict[str, jax.Array]:
    """Leaves by number, keys as numbers, without those of no size, which Orbax does not take."""
    leaves = ((str(i), _plain(leaf)) for i, leaf in enumerate(jax.tree.leaves(tree)))
    return {name: leaf for name, leaf in leaves if leaf.size}


def _plain(leaf: jax.Array) -> jax.Array:
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def _in_tree(like: PyTree, numbered: dict[str, jax.Array]) -> PyTree:
    leaves, structure = jax.tree.flatten(like)
    new = [_as_before(leaf, numbered[str(i)]) if str(i) in numbered else leaf for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, new)


def _as_before(leaf: jax.Array, plain: jax.Array) -> jax.Array:
    if not leaf.committed:
        # Orbax binds what it restores to its device, where it could not meet arrays that are spread over several.
        plain = jnp.asarray(np.asarray(plain))
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(plain, impl=jax.random.key_impl(leaf))
    return plain


def _history(record: dict[str, np.ndarray], compile_seconds: float) -> History:
    def group(prefix: str) -> dict[str, np.ndarray]:
        named = {_name(file): x for file, x in record.items()}
        return {n.removeprefix(prefix): np.asarray(x) for n, x in named.items() if n.startswith(prefix)}

    seconds = np.asarray(record.get("seconds", np.zeros(0)))
    return History(group("columns/"), seconds, group("evaluations/"), compile_seconds)


def _file(name: str) -> str:
    """Orbax takes names for paths."""
    return name.replace("/", "|")


def _name(file: str) -> str:
    return file.replace("|", "/")
