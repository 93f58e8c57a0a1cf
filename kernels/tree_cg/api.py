"""The op family tree_cg: the vector work of one conjugate gradient iteration over all leaves of a pytree at once.

Vectors are pytrees of arrays; all vectors of a call have one structure and, leaf by leaf, one shape and dtype. Scalars
have `curvax.tree.scalar_dtype`: the widest leaf dtype, at least float32.

| op | reads | writes | FLOPs | (n: elements over all leaves)
|---|---|---|---|
| `cg_update` | 4 n | 2 n | 8 n |
| `cg_direction` | 2 n | n | 2 n |
| `dots` | 2 n per pair, n less for a vector that comes again | 0 | 2 n per pair |

Batching: `jax.vmap` over any of the operands is exact: the native handlers take leading batch axes as they are.
Partitioning: inside `jax.shard_map` each device works on its shard and the scalars are the shard's own: the caller adds
them up with `jax.lax.psum`. Outside, the reference is partitioned by XLA like any JAX code; the native handlers are
not, so with several devices they are not taken there.
On NVIDIA GPUs the native handlers need curvax built with CURVAX_CUDA=ON and a GPU of compute capability 8.0 or newer.
There a call is one kernel launch over all leaves, up to 66 of them for `cg_update`, and one more for each further 544,
and a small one that adds up the blocks' sums, in a fixed order and in float64: a result is the same in every run. XLA
may record a call into a CUDA graph. On an H200 a whole step of `sgn_ce` takes 0.92 to 0.94 of its time with them.
Differentiation: none; the ops stay off the differentiated path.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax

from curvax.kernels._dispatch import Choice, Implementation, Op, Request, Variant, select, timed_on_hopper
from curvax.kernels._operands import floating, scalar
from curvax.kernels.tree_cg import native, reference
from curvax.tree import PyTree, scalar_dtype

_GAIN = "one pass over all leaves in one C++ call"

CG_UPDATE = Op("cg_update", (Variant("native", native.cannot, timed_on_hopper, gain=_GAIN), Variant("reference")))
CG_DIRECTION = Op(
    "cg_direction", (Variant("native", native.cannot, native.direction_better_not, gain=_GAIN), Variant("reference"))
)
DOTS = Op("dots", (Variant("native", native.cannot, timed_on_hopper, gain=_GAIN), Variant("reference")))
OPS = (CG_UPDATE, CG_DIRECTION, DOTS)


def cg_update(
    alpha: jax.Array | float,
    x: PyTree,
    p: PyTree,
    r: PyTree,
    q: PyTree,
    *,
    lam: jax.Array | float = 0.0,
    implementation: Implementation | Choice | None = None,
) -> tuple[PyTree, PyTree, jax.Array]:
    """One step along the search direction: x + alpha p, r - alpha (q + lam p) and the squared norm of the new residual.

    Args:
      alpha: step length, a scalar; cast to the scalar dtype.
      x: iterate.
      p: search direction.
      r: residual.
      q: the operator applied to `p`, without damping.
      lam: damping, a scalar; cast to the scalar dtype. It costs no pass of its own, since p is read anyway.
      implementation: None for the best supported one.

    Returns:
      The new iterate and residual, in the dtypes of `x` and `r`, and `<r, r>` of the new residual in the scalar dtype.

    Raises:
      Unsupported: the named implementation cannot run here.
      TypeError: the vectors differ in structure, shapes or dtypes, or are not floating, or a scalar is none.
    """
    x, p, r, q = _alike("cg_update", x=x, p=p, r=r, q=q)
    dtype = scalar_dtype(x)
    alpha, lam = scalar("cg_update", "alpha", alpha).astype(dtype), scalar("cg_update", "lam", lam).astype(dtype)
    if select(CG_UPDATE, implementation, Request.of(x)).implementation == "native":
        return native.cg_update(alpha, lam, x, p, r, q)
    return reference.cg_update(alpha, lam, x, p, r, q)


def cg_direction(
    beta: jax.Array | float, z: PyTree, p: PyTree, *, implementation: Implementation | Choice | None = None
) -> PyTree:
    """The next search direction: z + beta p.

    Args:
      beta: a scalar; cast to the scalar dtype.
      z: preconditioned residual.
      p: search direction.
      implementation: None for the best supported one.

    Returns:
      The new direction, in the dtypes of `p`.

    Raises:
      Unsupported: the named implementation cannot run here.
      TypeError: the vectors differ in structure, shapes or dtypes, or are not floating, or a scalar is none.
    """
    z, p = _alike("cg_direction", z=z, p=p)
    beta = scalar("cg_direction", "beta", beta).astype(scalar_dtype(p))
    if select(CG_DIRECTION, implementation, Request.of(p)).implementation == "native":
        return native.cg_direction(beta, z, p)
    return reference.cg_direction(beta, z, p)


def dots(
    pairs: Sequence[tuple[PyTree, PyTree]], *, implementation: Implementation | Choice | None = None
) -> tuple[jax.Array, ...]:
    """Several inner products at once, for instance `<p, q>` and `<p, p>`.

    Args:
      pairs: the vectors to multiply, all alike.
      implementation: None for the best supported one.

    Returns:
      One scalar per pair, in the scalar dtype; 0 for vectors without elements.

    Raises:
      Unsupported: the named implementation cannot run here.
      TypeError: the vectors differ in structure, shapes or dtypes, or are not floating.
      ValueError: there are no pairs, or not two vectors in each.
    """
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise ValueError("dots needs at least one pair of vectors: pass a list of tuples of two")
    flat = _alike("dots", **{f"pairs[{i}][{j}]": pair[j] for i, pair in enumerate(pairs) for j in (0, 1)})
    pairs = list(zip(flat[::2], flat[1::2], strict=True))
    if select(DOTS, implementation, Request.of(pairs[0][0])).implementation == "native":
        return native.dots(pairs)
    return reference.dots(pairs)


def _alike(op: str, **vectors: PyTree) -> tuple[PyTree, ...]:
    """The vectors with arrays for leaves; raises TypeError unless all have structure, shapes, dtypes of the first."""
    vectors = dict(zip(vectors, floating(op, **vectors), strict=True))
    (first_name, first), *others = vectors.items()
    structure = jax.tree.structure(first)
    types = [_type(leaf) for leaf in jax.tree.leaves(first)]
    for name, vector in others:
        actual = jax.tree.structure(vector)
        if actual != structure:
            raise TypeError(f"{op}: {name} has structure {actual}, {first_name} has {structure}: pass vectors alike")
        for i, (leaf, expected) in enumerate(zip(jax.tree.leaves(vector), types, strict=True)):
            if _type(leaf) != expected:
                raise TypeError(
                    f"{op}: leaf {i} of {name} is {_type(leaf)}, of {first_name} {expected}: pass vectors alike"
                )
    return tuple(vectors.values())


def _type(leaf: jax.Array) -> str:
    return f"{leaf.dtype}{leaf.shape}"
