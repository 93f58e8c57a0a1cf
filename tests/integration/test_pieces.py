"""A step in microbatches is that of the whole batch, or is refused: coupled losses, own normalizers, shared leaves."""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import curvax
from curvax.curvature import Evaluation, GaussNewton, Hessian, Microbatched, Model, ModelLoss, Needs
from curvax.losses import SoftmaxCrossEntropy, SquaredError
from tests.integration.harness import LOSSES, assert_close, key, moved, precision, truth_of
from tests.oracle import dense, losses
from tests.oracle.compiling import quick_jit
from tests.oracle.token_model import drawn, token_inputs, token_params, tokens

PyTree = Any
LAM = 0.1
EXACT = {"tol": 1e-13, "maxiter": 300}


def _step(method: Any, params: PyTree, batch: PyTree, model_state: PyTree = None) -> tuple[np.ndarray, dict[str, Any]]:
    shapes = jax.eval_shape(lambda: batch)
    state = method.init(params, batch=shapes, model_state=model_state)
    new, _, info = quick_jit(method.step)(params, batch, state, key())
    return moved(params, new), info


# --- losses that couple examples --------------------------------------------------------------------------------------


def _mlp(params: PyTree, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["w"] + params["b"]) @ params["v"]


def _mlp_params(outputs: int, dtype: Any = jnp.float64) -> PyTree:
    return {
        "w": drawn(0, 6, 8, dtype=dtype) / 2,
        "b": drawn(1, 8, dtype=dtype) / 10,
        "v": drawn(2, 8, outputs, dtype=dtype) / 3,
    }


COUPLED: dict[str, tuple[Callable[..., jax.Array], int, tuple[int, ...]]] = {
    "one output": (_mlp, 1, (7, 6)),
    "several outputs": (_mlp, 3, (7, 6)),
    "a scalar per example": (lambda p, x: _mlp(p, x)[:, 0], 1, (7, 6)),
    "positions": (_mlp, 2, (7, 3, 6)),
}


def _centred_truth(predict: Callable[..., jax.Array], params: PyTree, batch: PyTree) -> tuple[Any, ...]:
    """(value, gradient, Gauss-Newton matrix, Hessian) of half the mean squared centered residual, dense."""
    with jax.enable_x64(True):
        found = _centred_derivatives(predict)(dense.to_double(params), dense.to_double(batch))
        value, gradient, jacobian, hessian = map(np.asarray, found)
    *shape, parameters = jacobian.shape
    rows = (jacobian - jacobian.mean(0)).reshape(-1, parameters)
    positions = math.prod(shape[:-1]) if len(shape) > 1 else shape[0]
    return float(value), gradient, rows.T @ rows / positions, hessian


@functools.cache
def _centred_derivatives(predict: Callable[..., jax.Array]) -> Any:
    """(parameters, batch) -> (value, gradient, Jacobian of the outputs, Hessian) for parameters as a vector."""

    def derivatives(params: PyTree, batch: PyTree) -> tuple[jax.Array, ...]:
        at, tree = ravel_pytree(params)

        def loss(v: jax.Array) -> jax.Array:
            r = predict(tree(v), batch["x"]) - batch["y"]
            r = r - jnp.mean(r, axis=0)
            positions = r.size // (r.shape[-1] if r.ndim > 1 else 1)
            return 0.5 * jnp.sum(r * r) / positions

        jacobian = jax.jacrev(lambda v: predict(tree(v), batch["x"]))(at)
        return *jax.value_and_grad(loss)(at), jacobian, jax.hessian(loss)(at)

    return quick_jit(derivatives)


COUPLED_METHODS: dict[str, Callable[..., Any]] = {
    "sgn": lambda **k: curvax.sgn(**EXACT, **k),
    "egn": lambda **k: curvax.egn(**k),
    "spring": lambda **k: curvax.spring(momentum=0.0, **k),
    "gauss_newton": lambda **k: curvax.gauss_newton(lam_policy="const", **EXACT, **k),
    "newton_cg": lambda **k: curvax.newton_cg(**EXACT, **k),
}


@pytest.mark.parametrize(("name", "size"), [*((name, 3) for name in COUPLED_METHODS), ("egn", 1)])
def test_a_centered_loss_has_the_numbers_of_the_whole_batch(name: str, size: int, x64: None) -> None:
    predict, outputs, shape = COUPLED["several outputs"]
    params, x = _mlp_params(outputs), drawn(3, *shape)
    batch = {"x": x, "y": drawn(4, *predict(params, x).shape)}
    value, gradient, matrix, hessian = _centred_truth(predict, params, batch)
    lam = 3.0 if name == "newton_cg" else LAM
    method = COUPLED_METHODS[name](
        predict_fn=predict, loss=SquaredError(centered=True), lam0=lam, microbatch_size=size, record_rho_every_k=1
    )
    got, info = _step(method, params, batch)
    want = dense.damped_direction(hessian if name == "newton_cg" else matrix, gradient, lam)
    assert_close(got, want, 1e-8)
    assert float(info["loss"]) == pytest.approx(value, rel=1e-12)
    assert float(info["residual"]) < 1e-8 and bool(info["accepted"])
    curved = hessian if name == "newton_cg" else matrix
    after, *_ = _centred_truth(predict, dense.like(dense.vector(params) - want, params), batch)
    assert float(info["rho"]) == pytest.approx((value - after) / (gradient @ want - want @ curved @ want / 2), rel=1e-6)


@pytest.mark.parametrize("name", ["sgn", "egn", "newton_cg"])
def test_a_mask_of_a_centered_loss_drops_examples(name: str, x64: None) -> None:
    """Those without a weight count neither in the mean nor as examples, whatever stands there."""
    params, x, y = _mlp_params(2), drawn(3, 9, 6), drawn(4, 9, 2)
    valid = np.arange(9) % 3 != 1
    masked = {"x": jnp.where(valid[:, None], x, 50.0), "y": jnp.where(valid[:, None], y, jnp.nan), "m": valid}
    options: dict[str, Any] = {"predict_fn": _mlp, "loss": SquaredError(centered=True), "lam0": 3.0}
    options |= {} if name == "egn" else EXACT
    make = getattr(curvax, name)
    want, _ = _step(make(**options), params, {"x": x[valid], "y": y[valid]})
    for size in (None, 3):
        got, info = _step(make(**options, weight_key="m", microbatch_size=size), params, masked)
        assert_close(got, want, 1e-8)
        assert bool(info["accepted"]) and int(info["batch_fault"]) == 0


@pytest.mark.parametrize(("name", "kind"), [*((name, "Gauss-Newton") for name in COUPLED), ("positions", "Hessian")])
def test_products_and_rows_of_a_coupled_loss_in_pieces(name: str, kind: str, x64: None) -> None:
    predict, outputs, shape = COUPLED[name]
    params, x = _mlp_params(outputs), drawn(3, *shape)
    batch = {"x": x, "y": drawn(4, *predict(params, x).shape)}
    value, gradient, matrix, hessian = _centred_truth(predict, params, batch)
    loss, model = SquaredError(centered=True), Model(predict)
    inner = GaussNewton(model, loss) if kind == "Gauss-Newton" else Hessian(ModelLoss(model, loss))
    operator = Microbatched(inner, 3)

    @quick_jit
    def found(p: PyTree, v: PyTree) -> tuple[Any, ...]:
        needs = Needs(gradient=True, product=True, rows=kind == "Gauss-Newton")
        at = operator.linearize(p, Evaluation(batch), needs)
        assert at.product is not None
        rows = () if at.rows is None else (at.rows.gram(1 << 30), at.rows.diagonal(1 << 30))
        return at.loss, operator.value(p, Evaluation(batch)), at.gradient, (at.product(v), at.bend(v)), rows

    v = jax.tree.map(lambda p: jnp.asarray(np.random.default_rng(9).standard_normal(p.shape)), params)
    one, other, slope, (product, bend), rows = found(params, v)
    assert float(one) == pytest.approx(value, rel=1e-12) and float(other) == pytest.approx(value, rel=1e-12)
    np.testing.assert_allclose(dense.vector(slope), gradient, rtol=1e-9, atol=1e-12)
    curved = matrix if kind == "Gauss-Newton" else hessian
    np.testing.assert_allclose(dense.vector(product), curved @ dense.vector(v), rtol=1e-8, atol=1e-10)
    assert float(bend) == pytest.approx(dense.vector(v) @ curved @ dense.vector(v), rel=1e-8)
    if rows:
        values = np.linalg.eigvalsh(np.asarray(rows[0]))[::-1][: len(matrix)]
        np.testing.assert_allclose(values, np.linalg.eigvalsh(matrix)[::-1][: len(values)], rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(dense.vector(rows[1]), np.diag(matrix), rtol=1e-8, atol=1e-12)


def test_a_trust_region_trains_a_centered_loss_in_single_precision() -> None:
    """Taken on the parts of a batch, every step of it was refused at microbatches of one."""
    with precision(jnp.float32):
        params, x = _mlp_params(1, jnp.float32), drawn(3, 16, 6, dtype=jnp.float32)
        batch = {"x": x, "y": jnp.sin(x[:, :1])}
        method = curvax.spring(
            predict_fn=_mlp,
            loss=SquaredError(centered=True),
            lam_policy="trust_region",
            lam0=1e-2,
            momentum=0.0,
            microbatch_size=1,
        )
        step, state = quick_jit(method.step), method.init(params)
        whole = curvax.spring(
            predict_fn=_mlp, loss=SquaredError(centered=True), lam_policy="trust_region", lam0=1e-2, momentum=0.0
        )
        other, other_state, other_params = quick_jit(whole.step), whole.init(params), params
        for i in range(6):
            params, state, info = step(params, batch, state, key(i))
            other_params, other_state, want = other(other_params, batch, other_state, key(i))
            assert float(info["loss"]) == pytest.approx(float(want["loss"]), rel=2e-3)
    assert int(info["rejected"]) == int(want["rejected"]) <= 1


def test_the_optax_face_takes_a_centered_loss_in_pieces(x64: None) -> None:
    params, batch = _mlp_params(2), {"x": drawn(3, 7, 6), "y": drawn(4, 7, 2)}
    _, gradient, matrix, _ = _centred_truth(_mlp, params, batch)
    for solver in (curvax.solvers.CG(**EXACT), curvax.solvers.RowSpace(curvax.solvers.Cholesky())):
        tx = curvax.transforms.scale_by_ggn(_mlp, SquaredError(centered=True), LAM, solver=solver, microbatch_size=3)
        update, _ = quick_jit(lambda g, s, p, tx=tx: tx.update(g, s, p, batch=batch))(
            dense.like(gradient, params), tx.init(params), params
        )
        assert_close(dense.vector(update), dense.damped_direction(matrix, gradient, LAM), 1e-8)


# --- loss functions ---------------------------------------------------------------------------------------------------


def _masked_batch(valid: list[int]) -> PyTree:
    """Twelve sequences of six positions, of which the first `valid[i]` count."""
    mask = np.asarray([[1.0] * n + [0.0] * (6 - n) for n in valid])
    return {"x": drawn(0, 12, 6, 3), "y": drawn(1, 12, 6, 2), "m": jnp.asarray(mask)}


def _small(params: PyTree, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["w"]) @ params["v"]


def _small_params() -> PyTree:
    return {"w": drawn(5, 3, 5) / 2, "v": drawn(6, 5, 2) / 2}


def _terms(params: PyTree, batch: PyTree) -> jax.Array:
    return 0.5 * jnp.sum((_small(params, batch["x"]) - batch["y"]) ** 2, -1)


def _pair(params: PyTree, batch: PyTree) -> tuple[jax.Array, jax.Array]:
    return jnp.sum(_terms(params, batch) * batch["m"]), jnp.sum(batch["m"])


def _quotient(params: PyTree, batch: PyTree) -> jax.Array:
    total, weight = _pair(params, batch)
    return total / weight


@quick_jit
def _quotient_derivatives(params: PyTree, batch: PyTree) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(value, gradient, Hessian) for parameters as a vector."""
    at, tree = ravel_pytree(params)

    def loss(v: jax.Array) -> jax.Array:
        return _quotient(tree(v), batch)

    return *jax.value_and_grad(loss)(at), jax.hessian(loss)(at)


@pytest.mark.parametrize(
    ("name", "size"), [("newton_cg", None), ("newton_cg", 4), ("newton_cg", 5), ("newton_direct", 5)]
)
def test_totals_and_weights_are_added_before_the_division(name: str, size: int | None, x64: None) -> None:
    params, batch = _small_params(), _masked_batch([6, 6, 6, 6, 5, 0, 0, 0, 0, 0, 0, 0])
    value, gradient, hessian = _quotient_derivatives(params, batch)
    options = EXACT if name == "newton_cg" else {}
    method = getattr(curvax, name)(loss_fn=_pair, lam0=10.0, microbatch_size=size, **options)
    got, info = _step(method, params, batch)
    assert_close(got, dense.damped_direction(np.asarray(hessian), np.asarray(gradient), 10.0), 1e-8)
    assert float(info["loss"]) == pytest.approx(float(value), rel=1e-12)


@pytest.mark.fast
@pytest.mark.parametrize("name", ["sophia_h", "adahessian"])
def test_methods_on_totals_and_weights_do_not_see_the_pieces(name: str, x64: None) -> None:
    params, batch = _small_params(), _masked_batch([6, 6, 6, 6, 5, 0, 0, 0, 0, 0, 0, 0])
    whole, _ = _step(getattr(curvax, name)(loss_fn=_quotient), params, batch)
    pieces, info = _step(getattr(curvax, name)(loss_fn=_pair, microbatch_size=4), params, batch)
    assert_close(pieces, whole, 1e-8)
    assert bool(info["accepted"])


def test_an_empty_piece_adds_nothing_even_if_its_total_is_not_a_number(x64: None) -> None:
    """Of no examples that count the total is 0 / 0: no piece of it reaches the sum."""

    def loss_fn(p: PyTree, b: PyTree) -> tuple[jax.Array, jax.Array]:
        total, weight = _pair(p, b)
        return total + jnp.sum(b["m"] * (jnp.sum(p["w"] ** 2) / jnp.max(b["m"])) * 0.0), weight

    params, batch = _small_params(), _masked_batch([6, 6, 6, 6, 5, 0, 0, 0, 0, 0, 0, 0])
    whole, _ = _step(curvax.newton_cg(loss_fn=_quotient, lam0=10.0, **EXACT), params, batch)
    method = curvax.newton_cg(loss_fn=loss_fn, lam0=10.0, microbatch_size=4, batch_axes=0, **EXACT)
    got, info = _step(method, params, batch)
    assert_close(got, whole, 1e-8)
    assert bool(info["finite"])


def test_a_batch_of_no_weight_has_no_loss(x64: None) -> None:
    params, batch = _small_params(), _masked_batch([0] * 12)
    for size in (None, 4):
        got, info = _step(curvax.newton_cg(loss_fn=_pair, lam0=1.0, microbatch_size=size), params, batch)
        assert float(info["loss"]) == 0.0 and not np.any(got) and bool(info["finite"])


def test_a_weight_that_depends_on_the_parameters_is_refused(x64: None) -> None:
    params, batch = _small_params(), _masked_batch([6] * 12)

    def loss_fn(p: PyTree, b: PyTree) -> tuple[jax.Array, jax.Array]:
        return jnp.sum(_terms(p, b)), jnp.sum(jnp.square(p["w"]))

    with pytest.raises(ValueError, match=r"depends on the parameters: .*stop_gradient"):
        _step(curvax.newton_cg(loss_fn=loss_fn), params, batch)


@pytest.mark.parametrize("name", ["newton_cg", "adahessian"])
@pytest.mark.parametrize(
    ("loss_fn", "words"),
    [
        (_quotient, r"\(total, weight\)"),
        (lambda p, b: jnp.sum(_terms(p, b)), "set reduction='sum'"),
        (lambda p, b: jnp.mean(_terms(p, b) - _terms(p, b).mean(0)), "batch_axes="),
    ],
)
def test_a_loss_that_does_not_add_up_is_told(name: str, loss_fn: Any, words: str, x64: None) -> None:
    params, batch = _small_params(), _masked_batch([6] * 12)
    method = getattr(curvax, name)(loss_fn=loss_fn, microbatch_size=4)
    state = method.init(params)
    with pytest.raises(ValueError, match=words) as raised:
        quick_jit(method.step)(params, batch, state, key())
    assert "microbatch_size=4" in str(raised.value) and "\n" not in str(raised.value)
    # In one piece there is nothing to tell.
    whole = getattr(curvax, name)(loss_fn=loss_fn, microbatch_size=12)
    jax.eval_shape(whole.step, params, batch, whole.init(params), key())


def test_a_loss_function_with_a_leaf_that_is_shared(x64: None) -> None:
    """Position ids as long as the batch is."""
    params = {"w": drawn(0, 3, 4), "place": drawn(1, 7, 4)}
    batch = {"x": drawn(2, 7, 7, 3), "places": jnp.arange(7), "y": drawn(3, 7, 4)}

    def loss_fn(p: PyTree, b: PyTree) -> jax.Array:
        hidden = jnp.tanh(b["x"] @ p["w"] + p["place"][b["places"]]).mean(1)
        return 0.5 * jnp.mean(jnp.sum((hidden - b["y"]) ** 2, -1))

    whole, want = _step(curvax.newton_cg(loss_fn=loss_fn, lam0=10.0, **EXACT), params, batch)
    for size, axes in ((1, None), (3, None), (3, {"x": 0, "places": None, "y": 0})):
        method = curvax.newton_cg(loss_fn=loss_fn, lam0=10.0, microbatch_size=size, batch_axes=axes, **EXACT)
        got, info = _step(method, params, batch)
        assert_close(got, whole, 1e-9)
        assert float(info["loss"]) == pytest.approx(float(want["loss"]), rel=1e-12)


# --- which leaves are cut ---------------------------------------------------------------------------------------------


def _token_batch(examples: int, length: int, places: Any) -> PyTree:
    return {"x": token_inputs(examples, length, places), "y": jnp.asarray(np.arange(examples) % 3)}


LANES: dict[str, dict[str, Any]] = {"egn_ce": {}, "sgn_ce": EXACT, "ggn_direct_ce": {}}


@pytest.mark.parametrize(
    ("name", "examples", "size", "places"),
    [
        ("egn_ce", 7, 1, "a vector"),
        ("sgn_ce", 7, 3, "a vector"),
        ("ggn_direct_ce", 7, 3, "one row"),
        ("egn_ce", 4, 3, "one row"),
        ("sgn_ce", 4, 3, "a vector"),
    ],
)
def test_position_ids_are_not_cut(name: str, examples: int, size: int, places: str, x64: None) -> None:
    ids = np.arange(7) if places == "a vector" else np.arange(7)[None]
    params, batch = token_params(7), _token_batch(examples, 7, ids)
    truth = truth_of(types.SimpleNamespace(predict=tokens), "ce", params, batch)
    method = getattr(curvax, name)(predict_fn=tokens, lam0=LAM, microbatch_size=size, **LANES[name])
    got, info = _step(method, params, batch)
    assert_close(got, truth.direction(LAM), 1e-8)
    assert float(info["loss"]) == pytest.approx(truth.loss.value, rel=1e-12)


def test_kronecker_factors_and_plans_of_a_model_with_position_ids(x64: None) -> None:
    params, batch = token_params(7), _token_batch(7, 7, np.arange(7))
    given = {"x": {"tokens": 0, "places": None}, "y": 0}
    found = []
    variants: list[dict[str, Any]] = [{}, {"microbatch_size": 3}, {"microbatch_size": 3, "batch_axes": given}]
    for options in variants:
        method = curvax.kfac(predict_fn=tokens, loss=SoftmaxCrossEntropy(), fisher=_GGN, lam0=1.0, **options)
        got, _ = _step(method, params, batch)
        found.append(got)
        assert "dense" in method.plan_for(params, batch).explain()
    assert_close(found[1], found[0], 1e-8)
    assert_close(found[2], found[0], 1e-12)


_GGN = curvax.curvature.GeneralizedGaussNewton()


def _operator_network(params: PyTree, x: PyTree) -> jax.Array:
    return jnp.tanh(x["sensors"] @ params["branch"]) @ jnp.tanh(x["grid"] @ params["trunk"]).T


@pytest.mark.parametrize(("name", "points"), [("sgn", 5), ("egn", 7), ("gauss_newton", 7)])
def test_a_grid_that_all_examples_share_is_not_cut(name: str, points: int, x64: None) -> None:
    params = {"branch": drawn(0, 3, 4), "trunk": drawn(1, 2, 4)}
    batch = {"x": {"grid": drawn(2, points, 2), "sensors": drawn(3, 7, 3)}, "y": drawn(4, 7, points)}
    truth = truth_of(types.SimpleNamespace(predict=_operator_network), "mse", params, batch)
    options = {"lam_policy": "const"} if name == "gauss_newton" else {}
    options |= {} if name == "egn" else EXACT
    method = getattr(curvax, name)(
        predict_fn=_operator_network, loss=SquaredError(), lam0=LAM, microbatch_size=2, **options
    )
    got, info = _step(method, params, batch)
    assert_close(got, truth.direction(LAM), 1e-8)
    assert float(info["loss"]) == pytest.approx(truth.loss.value, rel=1e-12)


def _time_first(params: PyTree, x: jax.Array) -> jax.Array:
    """A recurrent network on (T, B, D), outputs (T, B, 2)."""

    def cell(h: jax.Array, x_t: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = jnp.tanh(x_t @ params["i"] + h @ params["h"])
        return h, h @ params["o"]

    return jax.lax.scan(cell, jnp.zeros((x.shape[1], 4), x.dtype), x)[1]


def _attention_over_time(params: PyTree, x: jax.Array) -> jax.Array:
    q = x @ params["i"]
    return jnp.einsum("bts,sbe,eo->tbo", jax.nn.softmax(jnp.einsum("tbe,sbe->bts", q, q)), q, params["o"])


def _running_sum(params: PyTree, x: jax.Array) -> jax.Array:
    return jnp.cumsum(x @ params["i"], 0) @ params["o"]


TIME_FIRST = {"scan": _time_first, "dot_general": _attention_over_time, "cumsum": _running_sum}
TIME_METHODS: dict[str, Callable[..., Any]] = {
    "sgn": lambda **k: curvax.sgn(loss=SquaredError(), **EXACT, **k),
    "egn": lambda **k: curvax.egn(loss=SquaredError(), **k),
    "gauss_newton": lambda **k: curvax.gauss_newton(loss=SquaredError(), lam_policy="const", **EXACT, **k),
}


def _time_problem() -> tuple[PyTree, PyTree]:
    params = {"i": drawn(0, 3, 4) / 2, "h": drawn(1, 4, 4) / 2, "o": drawn(2, 4, 2)}
    return params, {"x": drawn(4, 5, 4, 3), "y": drawn(5, 5, 4, 2), "w": jnp.asarray(_lengths())}


def _lengths() -> np.ndarray:
    """(T, B) masks of sequences of several lengths, one of them empty."""
    return np.asarray(np.arange(5)[:, None] < np.asarray([5, 3, 0, 4]), np.float64)


@pytest.mark.parametrize(("operation", "name"), list(zip(TIME_FIRST, TIME_METHODS, strict=True)))
def test_time_first_data_is_refused_unless_the_axis_is_said(operation: str, name: str, x64: None) -> None:
    predict, (params, batch) = TIME_FIRST[operation], _time_problem()
    truth = truth_of(types.SimpleNamespace(predict=predict), "mse", params, {k: batch[k] for k in ("x", "y")})
    plain = TIME_METHODS[name](predict_fn=predict, lam0=LAM, microbatch_size=2)
    with pytest.raises(ValueError, match=rf"microbatch_size=2.*{operation}.*batch_axes=") as raised:
        _step(plain, params, batch)
    assert "\n" not in str(raised.value)
    for size in (None, 3):
        method = TIME_METHODS[name](predict_fn=predict, lam0=LAM, microbatch_size=size, batch_axes={"x": 1, "y": 1})
        got, info = _step(method, params, batch)
        assert_close(got, truth.direction(LAM), 1e-8)
        assert float(info["loss"]) == pytest.approx(truth.loss.value, rel=1e-12)


def test_masks_and_layers_of_time_first_data(x64: None) -> None:
    params, batch = _time_problem()
    truth = dense.truth(_time_first, LOSSES["mse"], params, batch["x"], batch["y"], batch["w"], "mean")
    turned = {name: jnp.swapaxes(leaf, 0, 1) for name, leaf in batch.items()}

    def batch_first(p: PyTree, x: jax.Array) -> jax.Array:
        return jnp.swapaxes(_time_first(p, jnp.swapaxes(x, 0, 1)), 0, 1)

    kfac: dict[str, Any] = {"loss": SquaredError(), "fisher": _GGN, "weight_key": "w"}
    newton: dict[str, Any] = {"loss": SquaredError(), "lam0": 10.0, "weight_key": "w", **EXACT}
    want, _ = _step(curvax.kfac(predict_fn=batch_first, **kfac), params, turned)
    plain, _ = _step(curvax.newton_cg(predict_fn=batch_first, **newton), params, turned)
    for size in (None, 3):
        options: dict[str, Any] = {"predict_fn": _time_first, "batch_axes": 1, "microbatch_size": size}
        got, info = _step(curvax.egn(loss=SquaredError(), lam0=LAM, weight_key="w", **options), params, batch)
        assert_close(got, truth.direction(LAM), 1e-8)
        assert float(info["loss"]) == pytest.approx(truth.loss.value, rel=1e-12)
        assert_close(_step(curvax.kfac(**kfac, **options), params, batch)[0], want, 1e-8)
        assert_close(_step(curvax.newton_cg(**newton, **options), params, batch)[0], plain, 1e-8)


def test_logits_of_all_pairs_are_refused_in_pieces() -> None:
    def contrast(params: PyTree, x: jax.Array) -> jax.Array:
        h = jnp.tanh(x @ params["w"])
        return h @ h.T

    with precision(jnp.float32):
        params = {"w": drawn(0, 3, 4, dtype=jnp.float32)}
        batch = {"x": drawn(1, 8, 3, dtype=jnp.float32), "y": jnp.arange(8)}
        for name in ("sgn_ce", "sophia_g", "egn_ce"):
            method = getattr(curvax, name)(predict_fn=contrast, microbatch_size=4)
            with pytest.raises(ValueError, match=r"mixes examples .*dot_general"):
                _step(method, params, batch)


def test_rows_against_all_columns_are_cut_by_rows(x64: None) -> None:
    """Two towers: an image against all texts of the batch, which every piece sees."""

    def towers(params: PyTree, x: PyTree) -> jax.Array:
        return jnp.tanh(x["image"] @ params["i"]) @ jnp.tanh(x["text"] @ params["t"]).T

    params = {"i": drawn(0, 3, 4), "t": drawn(1, 2, 4)}
    batch = {"x": {"image": drawn(2, 6, 3), "text": drawn(3, 6, 2)}, "y": jnp.arange(6)}
    truth = truth_of(types.SimpleNamespace(predict=towers), "ce", params, batch)
    for name in LANES:
        method = getattr(curvax, name)(predict_fn=towers, lam0=LAM, microbatch_size=4, **LANES[name])
        got, info = _step(method, params, batch)
        assert_close(got, truth.direction(LAM), 1e-8)
        assert float(info["loss"]) == pytest.approx(truth.loss.value, rel=1e-12)


def test_statistics_of_the_batch_are_refused_or_those_of_the_piece(x64: None) -> None:
    def predict(params: PyTree, x: jax.Array, state: PyTree) -> tuple[jax.Array, PyTree]:
        hidden = x @ params["w"]
        return jnp.tanh(hidden - hidden.mean(0)) @ params["v"], {"mean": hidden.mean(0)}

    params, batch = _small_params(), {"x": drawn(0, 6, 3), "y": jnp.asarray([0, 1, 1, 0, 1, 0])}
    state = {"mean": jnp.zeros(5)}
    method = curvax.sgn_ce(predict_fn=predict, has_state=True, microbatch_size=2, lam0=LAM, **EXACT)
    with pytest.raises(ValueError, match=r"mixes examples .*reduce_sum"):
        _step(method, params, batch, state)
    said = curvax.sgn_ce(predict_fn=predict, has_state=True, microbatch_size=2, batch_axes=0, lam0=LAM, **EXACT)
    got, info = _step(said, params, batch, state)

    def by_piece(p: PyTree, x: jax.Array) -> jax.Array:
        # Examples are dealt out: 0 and 3, 1 and 4, 2 and 5.
        return jnp.stack([predict(p, x[piece::3], None)[0] for piece in range(3)], axis=1).reshape(6, -1)

    truth = dense.truth(by_piece, losses.softmax_cross_entropy, params, batch["x"], batch["y"], None, "mean")
    assert_close(got, truth.direction(LAM), 1e-8)
    assert float(info["loss"]) == pytest.approx(truth.loss.value, rel=1e-12)


def test_what_is_only_stored_or_shown_does_not_count_as_mixing(x64: None) -> None:
    def predict(params: PyTree, x: jax.Array, state: PyTree) -> tuple[jax.Array, PyTree, jax.Array]:
        hidden = jnp.tanh(x @ params["w"] - state["mean"])
        return hidden @ params["v"], {"mean": 0.9 * state["mean"] + 0.1 * hidden.mean(0)}, hidden.mean()

    params, batch = _small_params(), {"x": drawn(0, 6, 3), "y": jnp.asarray([0, 1, 1, 0, 1, 0])}
    method = curvax.egn_ce(predict_fn=predict, has_state=True, has_aux=True, microbatch_size=2, lam0=LAM)
    _, info = _step(method, params, batch, {"mean": jnp.zeros(5)})
    assert bool(info["accepted"])


def test_dropout_and_keys_do_not_count_as_mixing() -> None:
    def predict(params: PyTree, x: jax.Array, rng: jax.Array) -> jax.Array:
        hidden = jnp.tanh(x @ params["w"])
        kept = jax.random.bernoulli(rng, 0.9, hidden.shape)
        return jnp.where(kept, hidden, jnp.zeros_like(hidden)) @ params["v"]

    with precision(jnp.float32):
        params = {"w": drawn(5, 3, 5, dtype=jnp.float32), "v": drawn(6, 5, 2, dtype=jnp.float32)}
        batch = {"x": drawn(0, 6, 3, dtype=jnp.float32), "y": jnp.asarray([0, 1, 1, 0, 1, 0])}
        for name in ("sgn_ce", "egn_ce"):
            method = getattr(curvax, name)(predict_fn=predict, has_rng=True, microbatch_size=2)
            _, info = _step(method, params, batch)
            assert bool(info["accepted"])


@pytest.mark.parametrize(
    ("axes", "error", "words"),
    [
        ({"x": 0}, KeyError, "batch_axes says nothing of 'y'"),
        ({"x": 0, "y": None}, ValueError, "targets 'y'"),
        ({"x": 3, "y": 0}, ValueError, "'x'.*axis 3.*shape is"),
        ({"x": "0", "y": 0}, TypeError, "'x'.*pass an integer"),
        ({"x": [0, 0], "y": 0}, ValueError, "batch_axes of 'x'.*prefix"),
    ],
)
def test_axes_that_do_not_fit_are_told(axes: Any, error: type[Exception], words: str, x64: None) -> None:
    batch = {"x": drawn(0, 6, 3), "y": jnp.zeros(6, jnp.int32)}
    with pytest.raises(error, match=words):
        _step(curvax.sgn_ce(predict_fn=_small, batch_axes=axes, microbatch_size=2), _small_params(), batch)


def test_leaves_of_different_lengths_are_told_by_name(x64: None) -> None:
    batch = {"x": drawn(0, 6, 3), "y": jnp.zeros(5, jnp.int32)}
    with pytest.raises(ValueError, match=r"\(5,\).*\(6, 2\)"):
        _step(curvax.sgn_ce(predict_fn=_small, microbatch_size=2), _small_params(), batch)
