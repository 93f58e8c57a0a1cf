"""Modules that somebody else wrote are planned and costed by what they say of themselves, like those of the package."""

from __future__ import annotations

import ast
import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax import tree
from curvax.curvature import Curvature, GaussNewton, Linearization, Model
from curvax.damping import Constant, Damping, Outcome
from curvax.estimators import DiagonalEstimator
from curvax.kernels import Op, Request, Variant
from curvax.losses import SoftmaxCrossEntropy
from curvax.plan import Part, Plan
from curvax.preconditioners import EmaDiagonal, IdentityPreconditioner, Jacobi, Preconditioner
from curvax.requirements import Cadence, Requirement
from curvax.solvers import CG, Automatic, Cholesky, Diagonal, Lane, Result, RowSpace, Solution, Solver, System
from curvax.solvers.base import relative_residual
from curvax.work import Cost, SolveCost, StepWork
from tests.oracle.compiling import quick_jit

# A linear model, whose counts a page of arithmetic gives: x @ w and its transpose take 2 B D K operations each.
B, D, K = 64, 256, 8
PRODUCT = 2 * (2 * B * D * K)
PARAMS = {"w": jax.ShapeDtypeStruct((D, K), jnp.float32)}
BATCH = {"x": jax.ShapeDtypeStruct((B, D), jnp.float32), "y": jax.ShapeDtypeStruct((B,), jnp.int32)}


def _predict(params: Any, x: jax.Array) -> jax.Array:
    return x @ params["w"]


GGN = GaussNewton(Model(_predict), SoftmaxCrossEntropy())


def _assemble(**modules: Any) -> curvax.Method:
    return curvax.assemble(**{"curvature": GGN, "solver": CG(), "damping": Constant(0.1), **modules})


def _plan(**modules: Any) -> Plan:
    return _assemble(**modules).plan_for(PARAMS, BATCH)


def _cost(plan: Plan, part: Part) -> Cost:
    (cost,) = [p.cost for p in plan.costs if p.part is part]
    return cost


def _line(plan: Plan, part: Part) -> str:
    """The line of the part's cost, as it is printed."""
    (line,) = [line for line in plan.explain().splitlines() if part.value in line and "FLOP" in line]
    return line


def _steps(**modules: Any) -> dict[str, Any]:
    """A compiled step on random numbers of those shapes."""
    method = _assemble(**modules)
    draw = np.random.default_rng(0).normal
    params, batch = jax.tree.map(lambda s: jnp.asarray(abs(draw(size=s.shape)), s.dtype), (PARAMS, BATCH))
    return quick_jit(method.step)(params, batch, method.init(params), jax.random.key(0))[2]


OWN_OP = Op("own_op", (Variant("reference"),))


@dataclasses.dataclass(frozen=True)
class Richardson(Solver):
    """s <- s + eta (g - (C + lam I) s), from the last solution."""

    sweeps: int
    eta: float = 0.1

    @property
    def name(self) -> str:
        return f"Richardson, {self.sweeps} sweeps"

    @property
    def lane(self) -> Lane:
        return Lane.PARAMETER

    @property
    def products(self) -> int:
        return self.sweeps

    def init(self, like: Any) -> Any:
        return tree.zeros_like(like)

    def kernels(self, like: Any, rows: Callable[[], int]) -> tuple[tuple[Op, Request], ...]:
        return ((OWN_OP, Request.of(like)),)

    def solve(self, system: System, rhs: Any, state: Any, lam: jax.Array) -> Solution:
        s = state
        for _ in range(self.sweeps):
            rest = jax.tree.map(jnp.subtract, rhs, tree.axpy(lam, s, system.product(s)))
            s = tree.axpy(jnp.asarray(self.eta, lam.dtype), rest, s)
        residual = relative_residual(system, lam, rhs, s)
        return Solution(s, jnp.asarray(Result.MAX_ITERATIONS, jnp.int32), jnp.int32(self.sweeps), residual, s)


@dataclasses.dataclass(frozen=True)
class Inverse(Richardson):
    """Solves with the matrix."""

    @property
    def takes_matrix(self) -> bool:
        return True


def test_a_solver_is_costed_by_its_products() -> None:
    plan = _plan(solver=Richardson(5))
    assert _cost(plan, Part.SOLVE).flops == pytest.approx(5 * PRODUCT, rel=0.15)
    assert "Richardson, 5 sweeps" in plan.explain()
    assert f"{_cost(plan, Part.SOLVE).flops / 1e6:.3g} MFLOP" in _line(plan, Part.SOLVE)
    assert "own_op" in plan.explain(), "its op stands among the kernels"
    assert dict(plan.state_bytes)["solver"] == 4 * D * K
    assert _cost(_plan(solver=Richardson(10)), Part.SOLVE).flops == pytest.approx(
        2 * _cost(plan, Part.SOLVE).flops, rel=1e-6
    )
    assert np.isfinite(_steps(solver=Richardson(5))["loss"])


def test_a_solver_of_the_matrix_is_costed_like_the_dense_one() -> None:
    own, ours = _plan(solver=Inverse(1)), _plan(solver=Cholesky())
    assert _cost(own, Part.SOLVE) == _cost(ours, Part.SOLVE)
    assert _cost(own, Part.SOLVE).flops > D * K * PRODUCT
    rows = _plan(solver=RowSpace(Inverse(1)))
    assert _cost(rows, Part.SOLVE) == _cost(_plan(solver=RowSpace(Cholesky())), Part.SOLVE)
    assert "own_op" in rows.explain() and "gram_accumulate" in rows.explain()


@dataclasses.dataclass(frozen=True)
class Guess(Richardson):
    """Says itself what a system costs."""

    def system_cost(self, system: Any) -> Any:
        return SolveCost(Cost(flops=12345.0, memory=1.0), f"{system.unknowns} unknowns")


def test_a_solver_may_say_itself_what_it_costs() -> None:
    assert _cost(_plan(solver=Guess(1)), Part.SOLVE).flops == 12345
    plan = _plan(solver=Automatic((CG(), Guess(1), RowSpace(Guess(1)))))
    assert f"{D * K} unknowns" in plan.explain() and f"{B * (K - 1)} rows, {B * (K - 1)} unknowns" in plan.explain()
    assert plan.solver == Guess(1), "the planner takes it, since it promises to be the fastest"


@dataclasses.dataclass(frozen=True)
class Twice(DiagonalEstimator):
    """z * C (C z) / |C z|: of two products."""

    @property
    def needs_product(self) -> bool:
        return True

    @property
    def needs_sampling(self) -> bool:
        return False

    def diagonal(self, linearization: Linearization, key: jax.Array) -> Any:
        assert linearization.product is not None
        z = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), linearization.params_like)
        once = linearization.product(z)
        return jax.tree.map(jnp.multiply, once, linearization.product(tree.scale(1 / tree.norm(once), once)))


@dataclasses.dataclass(frozen=True)
class Declared(Twice):
    """The same, which says that it takes nine products."""

    def cost(self, work: StepWork) -> Cost:
        return work.product.times(9)


@pytest.mark.parametrize("wrap", [Jacobi, EmaDiagonal])
def test_an_estimator_is_costed_by_its_trace_or_by_what_it_says(wrap: Any) -> None:
    plan = _plan(preconditioner=wrap(Twice(), every=4))
    assert _cost(plan, Part.REFRESH).flops == pytest.approx(2 * PRODUCT, rel=0.15)
    assert "x 0.25 per step" in _line(plan, Part.REFRESH)
    assert _cost(_plan(preconditioner=wrap(Declared())), Part.REFRESH).flops == pytest.approx(9 * PRODUCT, rel=0.15)
    assert np.isfinite(_steps(preconditioner=wrap(Twice(), every=4))["loss"])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScalarState:
    """One number, and the refreshes that were not finite."""

    size: jax.Array
    rejected: jax.Array


@dataclasses.dataclass(frozen=True)
class Scalar(Preconditioner):
    """v / (|C z| + lam) after `count` steps of the power method."""

    count: int = 3
    every: int = 1

    @property
    def needs_product(self) -> bool:
        return True

    @property
    def needs_sampling(self) -> bool:
        return False

    def requirements(self) -> tuple[Requirement, ...]:
        return (*super().requirements(), Requirement(Part.INVERSES, Cadence((6,)), "Scalar's own"))

    def kernels(self, upcast: Any) -> tuple[tuple[Op, Request], ...]:
        return ((OWN_OP, Request.of(upcast)),)

    def init(self, params_like: Any) -> ScalarState:
        return ScalarState(jnp.ones((), tree.scalar_dtype(params_like)), jnp.zeros((), jnp.int32))

    def refresh(self, state: ScalarState, linearization: Linearization, key: jax.Array) -> ScalarState:
        assert linearization.product is not None
        z = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), linearization.params_like)
        for _ in range(self.count):
            z = linearization.product(tree.scale(1 / tree.norm(z), z))
        return ScalarState(tree.norm(z), state.rejected)

    def apply(self, state: ScalarState, lam: Any, v: Any) -> Any:
        return tree.scale(1 / (state.size + lam), v)


@pytest.mark.parametrize("solver", [CG(), Diagonal()])
def test_a_preconditioner_is_costed_by_its_trace(solver: Solver) -> None:
    plan = _plan(solver=solver, preconditioner=Scalar(every=2))
    own_pass = PRODUCT / 2 if solver == Diagonal() else 0  # in the diagonal lane the refresh has its own forward pass
    assert _cost(plan, Part.REFRESH).flops == pytest.approx(3 * PRODUCT + own_pass, rel=0.15)
    more = _plan(solver=solver, preconditioner=Scalar(count=8, every=2))
    assert _cost(more, Part.REFRESH).flops == pytest.approx(8 * PRODUCT + own_pass, rel=0.15)
    text = plan.explain()
    assert "Scalar's own" in text and "every 6 steps" in text and "own_op" in text and "Scalar(count=3" in text
    assert dict(plan.state_bytes)["preconditioner"] == 8
    assert np.isfinite(_steps(solver=solver, preconditioner=Scalar(every=2))["loss"])


@dataclasses.dataclass(frozen=True)
class Halving(Damping):
    """Halves lam every `period` steps if the loss fell."""

    period: int

    @property
    def name(self) -> str:
        return f"halving every {self.period}"

    @property
    def evaluate_every(self) -> int | None:
        return self.period

    def init(self) -> jax.Array:
        return jnp.ones(())

    def lam(self, state: jax.Array) -> jax.Array:
        return state

    def accepts(self, outcome: Outcome) -> jax.Array:
        return outcome.actual > 0

    def update(self, state: jax.Array, outcome: Outcome, due: jax.Array) -> jax.Array:
        return jnp.where(due & (outcome.actual > 0), state / 2, state)


def test_a_damping_policy_is_costed_by_the_looks_that_it_asks_for() -> None:
    plan = _plan(damping=Halving(5))
    assert _cost(plan, Part.LOSS_AFTER).flops == pytest.approx(PRODUCT / 2, rel=0.15)
    assert _cost(plan, Part.PREDICTED).flops == pytest.approx(PRODUCT, rel=0.15)
    for part in (Part.LOSS_AFTER, Part.PREDICTED):
        assert "x 0.20 per step" in _line(plan, part)
    assert "damping: halving every 5" in plan.explain() and dict(plan.state_bytes)["damping"] == 4
    assert np.isfinite(_steps(damping=Halving(5))["loss"])


class _Inner:
    """Reads one attribute of the operator that a `Power` repeats."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, power: Any, owner: Any = None) -> Any:
        return getattr(power.inner, self.name)


def _power(factor: int) -> Curvature:
    """The Gauss-Newton matrix `factor` times in a row, C C ... C: an operator of a class of its own."""

    def linearize(self: Any, params: Any, evaluation: Any, needs: Any) -> Linearization:
        at = self.inner.linearize(params, evaluation, needs)
        once = at.product

        def product(v: Any) -> Any:
            for _ in range(factor):
                v = once(v)
            return v

        return at if once is None else dataclasses.replace(at, product=product)

    inherited: dict[str, Any] = {name: _Inner(name) for name in Curvature.__abstractmethods__}
    own = {"linearize": linearize, "name": "power of C", "has_rows": False, "inner": GGN}
    return type("Power", (Curvature,), {**inherited, **own})()


def test_a_curvature_is_costed_by_its_trace() -> None:
    assert _cost(_plan(curvature=_power(1), solver=Richardson(1)), Part.SOLVE).flops == pytest.approx(PRODUCT, rel=0.15)
    plan = _plan(curvature=_power(3), solver=Richardson(2))
    assert _cost(plan, Part.SOLVE).flops == pytest.approx(2 * 3 * PRODUCT, rel=0.15)
    assert "power of C" in plan.explain()
    assert np.isfinite(_steps(curvature=_power(3), solver=Richardson(2))["loss"])


def test_the_planner_knows_no_concrete_module() -> None:
    def names(kind: type) -> set[str]:
        return {kind.__name__}.union(*(names(each) for each in kind.__subclasses__()))

    kinds = (Solver, Preconditioner, DiagonalEstimator, Damping, Curvature)
    known = set[str]().union(*map(names, kinds))
    assert {"CG", "KFAC", "Hutchinson", "TrustRegion", "Microbatched", IdentityPreconditioner.__name__} <= known
    for path in pathlib.Path(curvax.__file__).with_name("plan").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("isinstance", "type")
            ):
                asked = {n.id for argument in node.args for n in ast.walk(argument) if isinstance(n, ast.Name)}
                assert not asked & known, f"{path.name}:{node.lineno} asks for a concrete module"
