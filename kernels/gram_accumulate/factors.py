"""Rows that are not formed: the operands of gram_accumulate, checked, and the cheaper of their two forms."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

ROW_DTYPES = ("bfloat16", "float16", "float32", "float64")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Row r of group b stands for the sum over positions t of a_bt d_brt^T, or for d_br0 without activations.

    Attributes:
      activations: (groups, positions, in), or None.
      cotangents: (groups, rows, positions, out).
    """

    activations: jax.Array | None
    cotangents: jax.Array

    @property
    def groups(self) -> int:
        """Number of groups."""
        return self.cotangents.shape[0]

    @property
    def per_group(self) -> int:
        """Rows of a group."""
        return self.cotangents.shape[1]

    @property
    def total(self) -> int:
        """Number of rows."""
        return self.groups * self.per_group

    @property
    def positions(self) -> int:
        """Positions that the rows are sums over."""
        return self.cotangents.shape[2]

    @property
    def width_in(self) -> int:
        """Entries of an activation vector; 0 without activations."""
        return 0 if self.activations is None else self.activations.shape[2]

    @property
    def width_out(self) -> int:
        """Entries of a cotangent vector."""
        return self.cotangents.shape[3]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockRows:
    """Rows of a layer of several blocks (groups of a convolution, say): of different blocks they do not meet.

    Attributes:
      activations: (groups, blocks, positions, in), or None.
      cotangents: (groups, blocks, rows, positions, out).
    """

    activations: jax.Array | None
    cotangents: jax.Array

    @staticmethod
    def of(rows: Rows) -> BlockRows:
        """The rows as one block."""
        activations = None if rows.activations is None else rows.activations[:, None]
        return BlockRows(activations, rows.cotangents[:, None])

    @property
    def total(self) -> int:
        """Number of rows."""
        return self.cotangents.shape[0] * self.cotangents.shape[2]

    @property
    def first(self) -> Rows:
        """Those of the first block."""
        return Rows(None if self.activations is None else self.activations[:, 0], self.cotangents[:, 0])

    @property
    def as_rows(self) -> Rows:
        """Those of each block, with the blocks on axis 1."""
        return Rows(self.activations, self.cotangents)

    def by_block(self) -> Rows:
        """Those of each block, with the blocks in front."""
        return jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), self.as_rows)


def block_rows(activations: jax.Array | None, cotangents: jax.Array) -> BlockRows:
    """The operands of a layer, checked, with all axes."""
    _check_dtypes("", activations, cotangents)
    if activations is None:
        if cotangents.ndim != 4:
            raise ValueError(
                "gram_accumulate: cotangents without activations are explicit rows (groups, blocks, rows, width), "
                f"got shape {cotangents.shape}"
            )
        return BlockRows(None, cotangents[:, :, :, None, :])
    of_cotangents = tuple(cotangents.shape[axis] for axis in (0, 1, 3)) if cotangents.ndim == 5 else None
    if activations.ndim != 4 or activations.shape[:3] != of_cotangents:
        raise ValueError(
            "gram_accumulate: activations must be (groups, blocks, positions, in) beside cotangents (groups, blocks, "
            f"rows, positions, out), got {activations.shape} and {cotangents.shape}"
        )
    return BlockRows(activations, cotangents)


def _check_dtypes(name: str, activations: jax.Array | None, cotangents: jax.Array) -> None:
    for what, array in (("activations", activations), ("cotangents", cotangents)):
        if array is not None and str(array.dtype) not in ROW_DTYPES:
            raise TypeError(f"gram_accumulate: {name}{what} are {array.dtype}: pass one of {', '.join(ROW_DTYPES)}")


def rows(name: str, activations: jax.Array | None, cotangents: jax.Array) -> Rows:
    """The operands `<name>activations` and `<name>cotangents` of a call, checked, with a position axis."""
    _check_dtypes(name, activations, cotangents)
    if activations is None:
        if cotangents.ndim != 3:
            raise ValueError(
                f"gram_accumulate: {name}cotangents without activations are explicit rows (groups, rows, width), "
                f"got shape {cotangents.shape}"
            )
        return Rows(None, cotangents[:, :, None, :])
    if activations.ndim == 2 and cotangents.ndim == 3:
        activations, cotangents = activations[:, None, :], cotangents[:, :, None, :]
    if activations.ndim != 3 or cotangents.ndim != 4:
        raise ValueError(
            f"gram_accumulate: {name}activations must be (groups, in) beside cotangents (groups, rows, out), or "
            f"(groups, positions, in) beside (groups, rows, positions, out), got {activations.shape} and "
            f"{cotangents.shape}"
        )
    if activations.shape[:2] != (cotangents.shape[0], cotangents.shape[2]):
        raise ValueError(
            f"gram_accumulate: {name}activations have (groups, positions) {activations.shape[:2]} and cotangents "
            f"{(cotangents.shape[0], cotangents.shape[2])}: they must be equal"
        )
    return Rows(activations, cotangents)


def check_alike(left: Rows, right: Rows) -> None:
    """Raises ValueError unless rows of both can meet."""
    for what, a, b in (
        ("entries per activation", left.width_in, right.width_in),
        ("entries per cotangent", left.width_out, right.width_out),
    ):
        if a != b:
            raise ValueError(f"gram_accumulate: the rows have {a} {what} and those they meet {b}: they must be equal")


def one_layout(left: Rows, right: Rows) -> bool:
    """Whether groups of both have as many rows and positions."""
    return left.per_group == right.per_group and left.positions == right.positions


# What scaling and adding one entry costs, in multiplications and additions of a matrix product: measured on 2 CPU cores
# with 640 rows, 16 positions and widths 289 and 32: both forms take as many floating-point operations, and the kept one
# took 1.2 times as long as one product of all formed rows.
_ENTRYWISE = 16


def formed_is_cheaper(left: Rows, right: Rows, triangle: bool) -> bool:
    """Whether to form the rows of several positions first, by the work of either.

    Formed, each row costs the outer products of its positions, and each pair of rows in x out products. Kept, each pair
    of rows costs positions^2 products of `out` entries, and each pair of groups positions^2 of `in` entries. So
    forming wins where positions^2 exceeds about `in`. What is kept also scales and adds up every pair of rows for
    every pair of positions, entry by entry.
    """
    squared = left.positions * right.positions
    if left.activations is None or squared == 1:
        return False
    half = 0.5 if triangle else 1.0
    entries = left.width_in * left.width_out
    pairs, group_pairs = half * left.total * right.total, half * left.groups * right.groups
    products = left.total * left.positions + (0 if triangle else right.total * right.positions)
    formed = products * entries + pairs * entries
    return formed < squared * (pairs * (left.width_out + _ENTRYWISE) + group_pairs * left.width_in)


def form(factors: Rows, dtype: np.dtype) -> Rows:
    """The same rows, explicit, their sums over positions in `dtype`."""
    if factors.activations is None:
        return factors
    made = jnp.einsum(
        # Input entries last: XLA for CPUs takes half the time of the other order.
        "bti,brto->broi",
        factors.activations.astype(dtype),
        factors.cotangents.astype(dtype),
        precision=jax.lax.Precision.HIGHEST,
    )
    return Rows(None, made.reshape(factors.groups, factors.per_group, 1, factors.width_in * factors.width_out))
