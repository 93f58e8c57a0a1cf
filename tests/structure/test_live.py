"""What no output depends on, and uses that no derivative passes through, are read by nobody who reads a model's jaxpr.

Each model stands beside the same model written without them: leaves have the same rules, Kronecker factors and
everything made of rows the same numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from curvax.curvature import Evaluation, GaussNewton, Model, ObservedFisher
from curvax.jaxprs import Wanted
from curvax.live import live_part
from curvax.losses import SquaredError
from curvax.plan import cost as costing
from curvax.structure import (
    empirical_fisher_diagonal,
    examples_independent,
    ggn_diagonal,
    jacobian_gram,
    per_example_gradient_norms,
    report,
)
from tests.oracle import dense
from tests.oracle.compiling import quick_jit
from tests.structure.kronecker_models import Problem, block_diagonal, kronecker_matrix, normal

pytestmark = pytest.mark.usefixtures("x64")
Predict = Callable[[Any, Any], jax.Array]
stop = lax.stop_gradient
EXAMPLES = 5


def net(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p["w"] + p["b"]) @ p["v"] + p["c"]


NET = {"w": (3, 4), "b": (4,), "v": (4, 2), "c": (2,)}


def other(x: jax.Array) -> jax.Array:
    """Inputs of the use that counts for nothing."""
    return 3.0 * x[:, ::-1] + 1.0


@dataclasses.dataclass(frozen=True)
class Pair:
    """A model, and the same one without what is dead; up to a constant."""

    name: str
    model: Predict
    bare: Predict
    shapes: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=lambda: NET)
    inputs: tuple[int, ...] = (3,)

    def __str__(self) -> str:
        return self.name

    @property
    def params(self) -> dict[str, jax.Array]:
        return {name: 0.6 * normal(i, *shape) for i, (name, shape) in enumerate(self.shapes.items())}

    @property
    def x(self) -> jax.Array:
        return normal(7, EXAMPLES, *self.inputs)


def _pulled(p: Any, x: jax.Array) -> jax.Array:
    zeros = jnp.zeros((x.shape[0], p["w"].shape[0]), x.dtype)
    return jax.vjp(lambda z: z @ p["w"], zeros)[1](x)[0] + p["b"]


def _transposed_convolution(p: Any, x: jax.Array) -> jax.Array:
    def forward(z: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(z, p["k"], (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))

    return jax.vjp(forward, jnp.zeros((x.shape[0], 2 * x.shape[1], 2), x.dtype))[1](x)[0] + p["b"]


def _written_out_convolution(p: Any, x: jax.Array) -> jax.Array:
    kernel = jnp.flip(p["k"], 0).transpose(0, 2, 1)
    return (
        lax.conv_general_dilated(x, kernel, (1,), [(2, 1)], lhs_dilation=(2,), dimension_numbers=("NWC", "WIO", "NWC"))
        + p["b"]
    )


def _energy(p: Any, x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.tanh(x @ p["w"] + p["b"]) @ p["v"] + p["c"])


def _force(p: Any, x: jax.Array) -> jax.Array:
    return -jax.vmap(lambda r: jax.grad(lambda y: _energy(p, y))(r))(x)


def _force_of_batch(p: Any, x: jax.Array) -> jax.Array:
    return -jax.grad(lambda y: _energy(p, y))(x)


def _written_out_force(p: Any, x: jax.Array) -> jax.Array:
    slope = 1.0 - jnp.tanh(x @ p["w"] + p["b"]) ** 2
    return -(slope * (jnp.ones((x.shape[0], 2)) @ p["v"].T)) @ p["w"].T


def _second_derivative(p: Any, x: jax.Array) -> jax.Array:
    """u_xx of every output, by forward mode over forward mode, as a residual takes it."""
    e = jnp.asarray([1.0, 0.0, 0.0], x.dtype)

    def along(y: jax.Array) -> jax.Array:
        return jax.jvp(lambda z: net(p, z[None])[0], (y,), (e,))[1]

    return jax.vmap(lambda y: jax.jvp(along, (y,), (e,))[1])(x)


def _written_out_second_derivative(p: Any, x: jax.Array) -> jax.Array:
    e = jnp.ones((x.shape[0], 1)) * jnp.asarray([1.0, 0.0, 0.0])
    h, moved, again = jnp.tanh(x @ p["w"] + p["b"]), e @ p["w"], e @ p["w"]
    return (-2.0 * h * (1.0 - h**2) * moved * again) @ p["v"]


def _scan_with_a_teacher(p: Any, x: jax.Array) -> jax.Array:
    def layer(carry: Any, w: jax.Array) -> Any:
        h, teacher, unread = carry
        return (jnp.tanh(h @ w), stop(jnp.tanh(teacher @ w)), unread + jnp.mean(h @ w)), jnp.mean(h)

    (h, teacher, _), _ = lax.scan(layer, (x, other(x), jnp.zeros((), x.dtype)), p["s"])
    return h @ p["v"] - stop(teacher @ p["v"])


def _scan_alone(p: Any, x: jax.Array) -> jax.Array:
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["s"])[0] @ p["v"]


def _remat_with_a_rest(p: Any, x: jax.Array) -> jax.Array:
    @jax.checkpoint
    def layer(w: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        return jnp.tanh(y @ w), jnp.mean(y @ w), stop(other(y) @ w)

    h, _, target = layer(p["w"], x)
    return (h + p["b"]) @ p["v"] + p["c"] - jnp.sum(target, axis=1, keepdims=True)


def _td(p: Any, x: jax.Array) -> jax.Array:
    """A semi-gradient: what is chosen and bootstrapped by the same network has no derivative."""
    following = net(p, other(x))
    best = jnp.take_along_axis(following, jnp.argmax(following, axis=1)[:, None], axis=1)
    return net(p, x) - 0.9 * stop(best)


def _gated(p: Any, x: jax.Array) -> jax.Array:
    return net(p, x) * (net(p, other(x)) > 0).astype(x.dtype)


def _gated_alone(p: Any, x: jax.Array) -> jax.Array:
    return net(p, x) * (net(stop(p), other(x)) > 0).astype(x.dtype)


def _zeros_by_jvp(p: Any, x: jax.Array) -> jax.Array:
    """Tangents of zero reach a scan, and a product there, as arrays of zeros."""

    def run(y: jax.Array, t: jax.Array) -> jax.Array:
        return lax.scan(lambda c, _: (jnp.tanh(c) + (t @ p["w"]) @ p["u"], None), y @ p["w"], length=2)[0]

    return run(x, jnp.zeros_like(x)) @ p["v"]


def _nested_calls(p: Any, x: jax.Array) -> jax.Array:
    @jax.jit
    def both(p: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return net(p, x), net(p, other(x))

    return jax.jit(lambda p, x: both(p, x)[0])(p, x)


def _printing(p: Any, x: jax.Array) -> jax.Array:
    h = net(p, x)
    jax.debug.callback(lambda _: None, jnp.mean(h))
    return h


def _branch(p: Any, x: jax.Array) -> jax.Array:
    pair = lax.cond(
        jnp.sum(stop(p["c"])) > 0,
        lambda y: (jnp.sin(y), jnp.mean(y)),
        lambda y: (jnp.cos(y), jnp.max(y)),
        net(p, x),
    )
    return pair[0]


def _branch_alone(p: Any, x: jax.Array) -> jax.Array:
    return lax.cond(jnp.sum(stop(p["c"])) > 0, jnp.sin, jnp.cos, net(p, x))


PAIRS = (
    Pair("target network", lambda p, x: net(p, x) - stop(net(p, other(x))), net),
    Pair("stopped hidden layer", lambda p, x: net(p, x) - stop(jnp.tanh(other(x) @ p["w"])) @ stop(p["v"]), net),
    Pair("stopped parameters", lambda p, x: net(p, x) - net(stop(p), other(x)), net),
    Pair("semi-gradient", _td, net),
    Pair("times zero", lambda p, x: net(p, x) - 0.0 * net(p, other(x)), net),
    Pair("times an array of zeros", lambda p, x: net(p, x) + jnp.zeros_like(x[:, :2]) * net(p, other(x)), net),
    Pair("behind argmax", lambda p, x: net(p, x) + jnp.argmax(net(p, other(x)), -1)[:, None].astype(x.dtype), net),
    Pair("gated by its sign", _gated, _gated_alone),
    Pair("rounded", lambda p, x: net(p, x) + jnp.round(net(p, other(x))), net),
    Pair("dropped primal of vjp", _pulled, lambda p, x: x @ p["w"].T + p["b"], {"w": (4, 3), "b": (4,)}),
    Pair(
        "transposed convolution by vjp", _transposed_convolution, _written_out_convolution,
        {"k": (3, 2, 3), "b": (2,)}, (4, 3),
    ),
    Pair("force field by example", _force, _written_out_force),
    Pair("force field of the batch", _force_of_batch, _written_out_force),
    Pair("second derivative", _second_derivative, _written_out_second_derivative),
    Pair("scan with a teacher", _scan_with_a_teacher, _scan_alone, {"s": (2, 3, 3), "v": (3, 2)}),
    Pair("remat with a rest", _remat_with_a_rest, lambda p, x: (jnp.tanh(x @ p["w"]) + p["b"]) @ p["v"] + p["c"]),
    Pair(
        "zeros in a scan", _zeros_by_jvp,
        lambda p, x: lax.scan(lambda c, _: (jnp.tanh(c), None), x @ p["w"], length=2)[0] @ p["v"],
        {"w": (3, 4), "u": (4, 4), "v": (4, 2)},
    ),
    Pair("inside jit", _nested_calls, net),
    Pair("printing the mean of the batch", _printing, net),
    Pair("branches with a rest", _branch, _branch_alone),
)  # fmt: skip


@pytest.mark.parametrize("pair", PAIRS, ids=str)
class TestPairs:
    """A model beside the same one without what is dead."""

    def test_leaves_have_the_same_rules(self, pair: Pair) -> None:
        found, expected = (list(map(str, report(f, pair.params, pair.x))) for f in (pair.model, pair.bare))
        assert found == expected

    def test_kronecker_factors_are_the_same(self, pair: Pair) -> None:
        y = pair.bare(pair.params, pair.x)
        model, bare = (Problem(f, pair.params, {"x": pair.x, "y": y}) for f in (pair.model, pair.bare))
        np.testing.assert_allclose(matrix(model), matrix(bare), rtol=1e-9, atol=1e-12)

    def test_rows_are_the_jacobians(self, pair: Pair) -> None:
        params, x, loss = pair.params, pair.x, SquaredError()
        outputs, jacobian = dense.outputs_and_jacobian(pair.model, params, x)
        close(dense.outputs_and_jacobian(pair.bare, params, x)[1], jacobian)
        y = jnp.asarray(outputs) + 1.0

        def everything(params: Any, x: jax.Array, y: jax.Array) -> Any:
            return (
                jacobian_gram(pair.model, params, x).reshape(outputs.size, -1),
                ggn_diagonal(pair.model, loss, params, x, y),
                empirical_fisher_diagonal(pair.model, loss, params, x, y),
                per_example_gradient_norms(pair.model, loss, params, x, y),
            )

        gram, diagonal, fisher, norms = quick_jit(everything)(params, x, y)
        positions = outputs.size // outputs.shape[-1]
        close(gram, jacobian @ jacobian.T)
        close(dense.vector(diagonal), np.sum(jacobian**2, axis=0) / positions)
        # Residuals are all -1.
        slopes = jacobian.reshape(positions, outputs.shape[-1], -1).sum(axis=1)
        close(dense.vector(fisher), np.sum(slopes**2, axis=0) / positions)
        close(norms, np.linalg.norm(slopes.reshape(EXAMPLES, -1, slopes.shape[1]).sum(axis=1) / positions, axis=1))


def matrix(problem: Problem) -> np.ndarray:
    """All that Kronecker factors and diagonals stand for."""
    blocks, sums = problem.blocks, problem.sums()
    leaves = [np.zeros(leaf.shape) for leaf in jax.tree.leaves(problem.params)]
    for block, diagonal in zip(blocks.diagonal, sums.diagonal, strict=True):
        leaves[block.leaf] = np.asarray(diagonal)
    found = kronecker_matrix(blocks, sums.means(), sums.outputs, problem.params)
    return found + np.diag(np.concatenate([leaf.ravel() for leaf in leaves]))


def close(got: Any, want: Any) -> None:
    np.testing.assert_allclose(np.ravel(got), np.ravel(want), rtol=1e-9, atol=1e-10 * np.abs(want).max())


@pytest.mark.parametrize("name", ["dropped primal of vjp", "transposed convolution by vjp"])
def test_a_linear_model_by_vjp_is_exact(name: str) -> None:
    """K-FAC is the Gauss-Newton matrix there, bias and all."""
    pair = next(pair for pair in PAIRS if pair.name == name)
    y = pair.model(pair.params, pair.x)
    problem = Problem(pair.model, pair.params, {"x": pair.x, "y": y})
    blocks = problem.blocks
    assert len(blocks.kronecker) == 1 and not blocks.diagonal
    sums = problem.sums()
    found = kronecker_matrix(blocks, sums.means(), sums.outputs, pair.params)
    np.testing.assert_allclose(found, block_diagonal(problem.truth().ggn, blocks, pair.params), rtol=1e-9, atol=1e-12)


BESIDE = {
    "mean": lambda h: jnp.mean(h),
    "sum": lambda h: jnp.sum(h),
    "largest": lambda h: jnp.max(h, axis=0),
    "divided by the batch size": lambda h: jnp.sum(h, axis=0) / h.shape[0],
    "correlations": lambda h: h.T @ h,
    "order": lambda h: jnp.argsort(h, axis=0),
    "of example zero": lambda h: h[0],
}


@pytest.mark.parametrize("beside", BESIDE.values(), ids=BESIDE.keys())
@pytest.mark.parametrize("around", ["plain", "jit", "remat", "scan"])
def test_what_is_computed_beside_the_outputs_mixes_nothing(beside: Callable[..., Any], around: str) -> None:
    def layer(w: jax.Array, x: jax.Array) -> tuple[jax.Array, Any]:
        h = jnp.tanh(x @ w)
        return h, beside(h)

    def predict(p: Any, x: jax.Array) -> jax.Array:
        if around == "scan":
            return lax.scan(lambda h, w: layer(w, h), x, jnp.stack([p, p]))[0]
        wrapped = {"plain": layer, "jit": jax.jit(layer), "remat": jax.checkpoint(layer)}[around]
        return wrapped(p, x)[0]

    w, x = normal(0, 3, 3), normal(1, 4, 3)
    independent, reason = examples_independent(predict, w, x)
    assert independent, reason
    assert not examples_independent(lambda p, x: predict(p, x - jnp.mean(x, axis=0)), w, x)[0]
    # A value without a derivative is a value: one that mixes examples makes outputs and rows that do.
    assert not examples_independent(lambda p, x: predict(p, x - stop(jnp.mean(x, axis=0))), w, x)[0]


def test_an_observed_fisher_of_a_target_network_has_its_rows() -> None:
    """The row lane of a model with a stopped use: S^T J J^T S against the explicit Jacobian."""
    pair = PAIRS[0]
    outputs, jacobian = dense.outputs_and_jacobian(pair.model, pair.params, pair.x)
    curvature = GaussNewton(Model(pair.model), SquaredError(reduction="sum"), ObservedFisher())
    batch = {"x": pair.x, "y": jnp.asarray(outputs) - 2.0}
    rows = curvature.linearize(pair.params, Evaluation(batch), _needs_rows()).rows
    assert rows is not None
    slopes = 2.0 * jacobian.reshape(EXAMPLES, 2, -1).sum(axis=1)
    close(quick_jit(lambda: rows.gram(1 << 30))(), slopes @ slopes.T)


def _needs_rows() -> Any:
    from curvax.curvature import Needs

    return Needs(rows=True)


@pytest.mark.fast
def test_each_operand_says_what_matters_of_it() -> None:
    def function(w: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.sin(w) * stop(jnp.cos(w)) + x * 0.0, jnp.floor(w)

    jaxpr = jax.make_jaxpr(function)(1.0, 1.0)
    live = live_part(jaxpr, [True, False])
    found = {step.primitive: step.wanted for step in live.steps}
    assert found["sin"] == (Wanted.DERIVATIVE,)
    assert found["cos"] == found["floor"] == (Wanted.VALUE,)
    assert live.steps[-1].outputs[0] in live.results
    assert live.wanted == (Wanted.DERIVATIVE, Wanted.VALUE)
    nothing = live_part(jax.make_jaxpr(lambda w: jnp.sum(w) * 0.0)(1.0), [True])
    assert nothing.wanted == (Wanted.VALUE,)


def test_what_a_scan_carries_in_vain_is_dead() -> None:
    def function(w: jax.Array) -> jax.Array:
        def body(carry: Any, _: None) -> Any:
            a, b, c = carry
            return (a * w, b + a, c * 2.0), b

        return lax.scan(body, (w, w, w), length=3)[0][0]

    live = live_part(jax.make_jaxpr(function)(1.0), [True])
    (scan,) = live.steps
    (body,) = scan.bodies
    assert [step.primitive for step in body.steps] == ["mul"]
    assert [result is None for result in body.results] == [False, True, True, True]
    assert scan.wanted[0] is Wanted.DERIVATIVE


def test_costs_count_what_results_need() -> None:
    def model(w: jax.Array, x: jax.Array) -> jax.Array:
        return jax.vjp(lambda z: z @ w, jnp.zeros((x.shape[0], w.shape[0])))[1](x)[0]

    w, x = jnp.ones((30, 20)), jnp.ones((7, 20))
    assert costing.trace(model, w, x).flops == costing.trace(lambda w, x: x @ w.T, w, x).flops == 2 * 7 * 20 * 30
