"""The command line: `curvax methods | plan | diagnose | doctor | calibrate | bench`.

What it says comes from the library itself: presets from the registry, keywords from their signatures and docstrings,
plans from `Method.plan_for`, kernels from their own probes. Exit codes: 0 for success, 1 for something broken (or a
benchmark that failed), 2 for a usage error.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import importlib.metadata
import inspect
import itertools
import pkgutil
import platform
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

import curvax
from curvax import calibrate, ffi, kernels, methods, versions
from curvax.kernels import (
    batched_cg,
    batched_cholesky_solve,
    dense_linalg,
    diagonal_update,
    gram_accumulate,
    hutchinson_reduce,
    tree_cg,
)
from curvax.kernels._dispatch import Backend, Implementation, Op, Request, Variant
from curvax.kernels.linear_softmax_hvp import LINEAR_SOFTMAX_HVP, linear_softmax_hvp
from curvax.kernels.linear_softmax_residual import LINEAR_SOFTMAX_RESIDUAL, linear_softmax_residual
from curvax.kernels.sampled_softmax_residual import SAMPLED_SOFTMAX_RESIDUAL, sampled_softmax_residual
from curvax.kernels.softmax_hvp import SOFTMAX_HVP, softmax_hvp
from curvax.losses import Loss, SoftmaxCrossEntropy, SquaredError, VariationalEnergy
from curvax.pipes import until_closed
from curvax.plan import machine
from curvax.tree import PyTree

_MODEL_KEYWORDS = ("predict_fn", "loss", "loss_fn", "x_key", "y_key", "weight_key", "backend", "inner")


class UsageError(Exception):
    """Something is wrong with the arguments; the message is one sentence."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: arguments without the program's name; those of the process if `None`.

    Returns:
      The exit code.

    Raises:
      SystemExit: with code 2 for arguments that argparse refuses, 0 after --help and --version.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(argv)
    if rest and options.run is not _bench:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.rest = rest
    try:
        return until_closed(lambda: options.run(options))
    except UsageError as error:
        print(f"curvax: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="curvax", description="Curvature-aware training for JAX.")
    parser.add_argument("--version", action="version", version=f"curvax {curvax.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    listing = commands.add_parser("methods", help="list the presets, or show one with its keywords")
    listing.add_argument("name", nargs="?", metavar="NAME", help="a preset")
    listing.set_defaults(run=_methods)

    plan = commands.add_parser("plan", help="print the plan of a preset on a small network")
    plan.add_argument("name", metavar="NAME", help="a preset")
    plan.add_argument("--batch", type=_positive, default=128, help="examples in the batch (128)")
    plan.add_argument("--widths", type=_widths, default=(64, 64), help="inputs and hidden widths (64,64)")
    plan.add_argument("--classes", type=_positive, default=10, help="outputs (10)")
    plan.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="a keyword of the preset")
    plan.add_argument("--backend", choices=get_args(Backend), default="auto", help="preferred kernels (auto)")
    plan.set_defaults(run=_plan)

    diagnose = commands.add_parser("diagnose", help="print a page about a run: noise, curvature, cost of steps, advice")
    diagnose.add_argument("setup", metavar="MODULE:FUNCTION", help="returns predict_fn, loss, params, data")
    diagnose.set_defaults(run=_diagnose)

    commands.add_parser("doctor", help="check versions, devices and kernels").set_defaults(run=_doctor)
    rates = commands.add_parser("calibrate", help="measure this machine's rates, which plans are predicted from")
    rates.add_argument("--dry-run", action="store_true", help="measure and print, store nothing")
    rates.set_defaults(run=_calibrate)
    bench = commands.add_parser("bench", help="run the benchmarks of a source checkout", add_help=False)
    bench.set_defaults(run=_bench)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0.")
    return int(text)


def _widths(text: str) -> tuple[int, ...]:
    return tuple(_positive(part) for part in text.split(","))


def _methods(options: argparse.Namespace) -> int:
    """`curvax methods [NAME]`."""
    if options.name is None:
        presets = methods.list_methods()
        width = max(map(len, presets))
        for name, line in presets.items():
            print(f"{name:<{width}}  {line}")
        print("\ncurvax methods NAME shows a preset's keywords, curvax plan NAME what one of its steps does.")
        return 0
    info = _describe(options.name)
    print(f"{info.name}: {info.description}\n\n{info.doc}\n\nkeywords")
    parameters = sorted(info.signature.parameters.values(), key=lambda p: p.default is not inspect.Parameter.empty)
    keywords = [_keyword(p) for p in parameters]
    width = min(max(map(len, keywords)), 36)
    for parameter, keyword in zip(parameters, keywords, strict=True):
        print(f"  {keyword:<{width}}  {info.keywords.get(parameter.name, '')}".rstrip())
    return 0


def _describe(name: str) -> methods.MethodInfo:
    try:
        return methods.describe(name)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _keyword(parameter: inspect.Parameter) -> str:
    if parameter.default is inspect.Parameter.empty:
        return f"{parameter.name} (required)"
    return f"{parameter.name}={parameter.default!r}"


def _plan(options: argparse.Namespace) -> int:
    """`curvax plan NAME`."""
    info = _describe(options.name)
    given = _keywords(options.option)
    for word in given:
        if word in _MODEL_KEYWORDS:
            raise UsageError(f"{word} belongs to the built-in network or has a flag of its own: leave it out.")
    loss = _loss(info)
    own: dict[str, Any] = {"predict_fn": _predict, "loss": loss, "backend": options.backend}
    own |= {"inner": optax.adamw(1e-3), "inner_steps": 3}
    own = {word: value for word, value in own.items() if word in info.signature.parameters and word not in given}
    classes = 1 if isinstance(loss, VariationalEnergy) else options.classes
    params, batch = _network(options.widths, classes, options.batch, loss)
    try:
        with warnings.catch_warnings():
            # A fallback from the backend is in the plan, with its reason.
            warnings.simplefilter("ignore", UserWarning)
            plan = methods.make(options.name, **own, **given).plan_for(params, batch)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    widths = "-".join(map(str, (*options.widths, classes)))
    print(f"{options.name} on a {widths} network ({count} parameters), batch {options.batch}")
    print(plan.explain())
    return 0


def _keywords(pairs: Sequence[str]) -> dict[str, Any]:
    """Python literals from KEY=VALUE; what is no literal is a string."""
    keywords = {}
    for pair in pairs:
        key, separator, text = pair.partition("=")
        if not separator or not key.isidentifier():
            raise UsageError(f"--option takes KEY=VALUE, such as lam0=0.1, not {pair!r}.")
        try:
            keywords[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            keywords[key] = text
    return keywords


def _loss(info: methods.MethodInfo) -> Loss:
    parameter = info.signature.parameters.get("loss")
    if parameter is not None and isinstance(parameter.default, Loss):
        return parameter.default
    if info.name == "vmc":
        return VariationalEnergy()
    return SquaredError() if "mse" in info.name.split("_") else SoftmaxCrossEntropy()


def _network(widths: Sequence[int], classes: int, batch: int, loss: Loss) -> tuple[PyTree, Mapping[str, jax.Array]]:
    """Parameters and batch of zeros: a plan asks for shapes and dtypes alone."""
    sizes = (*widths, classes)
    params = [
        {"w": jnp.zeros((a, b), jnp.float32), "b": jnp.zeros(b, jnp.float32)} for a, b in itertools.pairwise(sizes)
    ]
    labels = jnp.zeros(batch, jnp.int32)
    targets = labels if isinstance(loss, SoftmaxCrossEntropy) else jnp.zeros((batch, classes), jnp.float32)
    return params, {"x": jnp.zeros((batch, widths[0]), jnp.float32), "y": targets}


def _predict(params: PyTree, x: jax.Array) -> jax.Array:
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def _diagnose(options: argparse.Namespace) -> int:
    """`curvax diagnose MODULE:FUNCTION`."""
    module, separator, name = options.setup.partition(":")
    if not (separator and module and name.isidentifier()):
        raise UsageError(f"diagnose takes MODULE:FUNCTION, such as train:setup, not {options.setup!r}.")
    sys.path.insert(0, str(Path.cwd()))
    try:
        setup = getattr(importlib.import_module(module), name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise UsageError(f"{options.setup}: {error}.") from error
    run = setup()
    if not isinstance(run, tuple) or len(run) != 4:
        raise UsageError(f"{options.setup} must return (predict_fn, loss, params, data), not a {type(run).__name__}.")
    print(curvax.diagnose(*run))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    """`curvax doctor`: versions, devices, the native module, and each implementation of each kernel, really called."""
    del options
    print(f"curvax    {curvax.__version__}")
    for name, version, warning in _versions():
        print(f"{name:<9} {version:<12} {'ok' if warning is None else f'WARNING: {warning}'}")
    for device in jax.devices():
        print(f"device    {device.platform}:{device.id} {device.device_kind}")
    print(f"planner   {machine.machine()}")
    findings = [_native("cpu"), _native("cuda"), *(finding for check in _CHECKS for finding in _implementations(check))]
    findings += [_unchecked(op) for op in _ops() if op not in {check.op for check in _CHECKS}]
    for finding in findings:
        print(finding)
    broken = [finding for finding in findings if finding.broken]
    print(f"{len(broken)} broken: reinstall curvax, or report it with this output." if broken else "nothing is broken")
    return 1 if broken else 0


def _versions() -> list[tuple[str, str, str | None]]:
    """(package, version, warning) of Python and of what curvax depends on."""
    python = platform.python_version()
    oldest = {"python": "3.11"} | _requirements()
    rows = [("python", python, _too_old(python, oldest["python"]))]
    for name in ("jax", "jaxlib", "optax", "numpy"):
        version = importlib.metadata.version(name)
        warning = versions.untested(version) if name == "jax" else _too_old(version, oldest.get(name, "0"))
        rows.append((name, version, warning))
    return rows


def _requirements() -> dict[str, str]:
    """Least versions from curvax's own metadata; none where it is not installed as a package."""
    try:
        required = importlib.metadata.requires("curvax") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    plain = (re.match(r"^([\w-]+)>=([\d.]+)$", line.replace(" ", "")) for line in required)
    return {match[1]: match[2] for match in plain if match}


def _too_old(version: str, oldest: str) -> str | None:
    if versions.release(version) >= versions.release(oldest):
        return None
    return f"curvax is tested with {oldest} and newer: upgrade."


@dataclasses.dataclass(frozen=True)
class _Finding:
    """One line of the report."""

    subject: str
    implementation: str
    verdict: str
    reason: str

    @property
    def broken(self) -> bool:
        return self.verdict == "BROKEN"

    def __str__(self) -> str:
        return f"{self.subject:<25}{self.implementation:<11}{self.verdict:<8}{self.reason}"


@dataclasses.dataclass(frozen=True)
class _Check:
    """A small call of an op: `call(implementation)` returns a pytree of arrays, `request` is what the probes see."""

    op: Op
    request: Callable[[], Request]
    call: Callable[[Implementation], PyTree]


def _vector(seed: int) -> PyTree:
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in (("b", (7,)), ("w", (31, 7)))}


def _matrix(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def _probes(seed: int) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[None], _vector(seed))


def _half() -> jax.Array:
    return jnp.asarray(0.5, jnp.float32)


def _rows() -> tuple[jax.Array, jax.Array, jax.Array]:
    """A matrix of 21 rows by 21, activations and cotangents."""
    rng = np.random.default_rng(0)
    shapes = ((21, 21), (7, 5), (7, 3, 4))
    gram, activations, cotangents = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    return gram, activations, cotangents


def _systems() -> tuple[jax.Array, jax.Array]:
    """Matrices, diagonally dominant, and right-hand sides."""
    rng = np.random.default_rng(0)
    half = rng.normal(size=(3, 5, 5))
    matrices = half @ half.transpose(0, 2, 1) + 5 * np.eye(5)
    return jnp.asarray(matrices, jnp.float32), jnp.asarray(rng.normal(size=(3, 5)), jnp.float32)


_CHECKS = (
    _Check(
        tree_cg.CG_UPDATE,
        lambda: Request.of(_vector(0)),
        lambda name: tree_cg.cg_update(_half(), *map(_vector, range(4)), implementation=name),
    ),
    _Check(
        tree_cg.CG_DIRECTION,
        lambda: Request.of(_vector(0)),
        lambda name: tree_cg.cg_direction(_half(), _vector(0), _vector(1), implementation=name),
    ),
    _Check(
        tree_cg.DOTS,
        lambda: Request.of(_vector(0)),
        lambda name: tree_cg.dots([(_vector(0), _vector(1)), (_vector(0), _vector(0))], implementation=name),
    ),
    _Check(
        SOFTMAX_HVP,
        lambda: Request.of(_matrix(0, 5, 300)),
        lambda name: softmax_hvp(_matrix(0, 5, 300), _matrix(1, 5, 300), implementation=name),
    ),
    _Check(
        SAMPLED_SOFTMAX_RESIDUAL,
        lambda: Request.of(_matrix(0, 5, 300)),
        lambda name: sampled_softmax_residual(
            _matrix(0, 5, 300), jnp.linspace(0.1, 0.9, 5, dtype=jnp.float32), implementation=name
        ),
    ),
    _Check(
        LINEAR_SOFTMAX_HVP,
        lambda: Request.of(_matrix(0, 5, 300)),
        lambda name: linear_softmax_hvp(
            *(_matrix(seed, *shape) for seed, shape in enumerate(((5, 8), (8, 300)) * 2)),
            precision="highest",
            implementation=name,
        ),
    ),
    _Check(
        LINEAR_SOFTMAX_RESIDUAL,
        lambda: Request.of(_matrix(0, 5, 300)),
        lambda name: linear_softmax_residual(
            _matrix(0, 5, 8), _matrix(1, 8, 300), jnp.arange(5, dtype=jnp.int32), implementation=name
        ),
    ),
    _Check(
        hutchinson_reduce.HUTCHINSON_REDUCE,
        lambda: Request.of(_vector(0)),
        lambda name: hutchinson_reduce.hutchinson_reduce(_probes(0), _probes(1), ((), (0,)), implementation=name),
    ),
    _Check(
        diagonal_update.DIAGONAL_UPDATE,
        lambda: Request.of(_vector(0)),
        lambda name: diagonal_update.diagonal_update(
            diagonal_update.UpdateRule(diagonal_update.DenominatorRule("floor"), beta1=0.5, clip=1.0),
            diagonal_update.UpdateScalars(1.0, 1.0, 0.1, 1.0, 0.1, -0.1),
            *map(_vector, range(4)),
            implementation=name,
        ),
    ),
    _Check(
        gram_accumulate.GRAM_ACCUMULATE,
        lambda: Request.of(_rows()),
        # Above the diagonal the op leaves what it likes.
        lambda name: jnp.tril(gram_accumulate.gram_accumulate(*_rows(), implementation=name)),
    ),
    _Check(
        batched_cg.BATCHED_CG,
        lambda: Request.of(*_systems()),
        lambda name: batched_cg.batched_cg(*_systems(), implementation=name).value,
    ),
    _Check(
        batched_cg.BATCHED_CG_PRODUCT,
        lambda: Request.of(_systems()[1]),
        lambda name: batched_cg.batched_cg(lambda v: 2 * v, _systems()[1], implementation=name).value,
    ),
    _Check(
        batched_cholesky_solve.BATCHED_CHOLESKY_SOLVE,
        lambda: Request.of(*_systems()),
        lambda name: batched_cholesky_solve.batched_cholesky_solve(*_systems(), implementation=name).value,
    ),
    _Check(
        dense_linalg.CHOLESKY,
        lambda: Request.of(_systems()[0]),
        lambda name: dense_linalg.cholesky(_systems()[0], implementation=name).lower,
    ),
    _Check(
        dense_linalg.TRIANGULAR_SOLVE,
        lambda: Request.of(_systems()[0]),
        lambda name: dense_linalg.triangular_solve(*[_systems()[0]] * 2, implementation=name),
    ),
    _Check(
        dense_linalg.EIGH,
        lambda: Request.of(_systems()[0]),
        # Vectors have either sign.
        lambda name: dense_linalg.eigh(_systems()[0], implementation=name).values,
    ),
    _Check(
        dense_linalg.QR,
        lambda: Request.of(_systems()[0]),
        lambda name: jnp.abs(dense_linalg.qr(_systems()[0], implementation=name).r),
    ),
    _Check(
        diagonal_update.DIAGONAL_ACCUMULATE,
        lambda: Request.of(_vector(0)),
        lambda name: diagonal_update.diagonal_accumulate(
            diagonal_update.AccumulateRule(0.5),
            _vector(0),
            diagonal_update.DiagonalEstimate((_vector(1), _vector(2)), "product"),
            implementation=name,
        ),
    ),
)


def _native(platform: ffi.Platform) -> _Finding:
    try:
        status = ffi.native_status(platform)
    except (ImportError, RuntimeError) as error:
        return _Finding("native module", platform, "BROKEN", str(error))
    return _Finding("native module", platform, "works" if status.available else "absent", status.reason)


def _implementations(check: _Check) -> list[_Finding]:
    return [_try(check, variant) for variant in check.op.variants]


def _try(check: _Check, variant: Variant) -> _Finding:
    """Calls one implementation and compares it with the reference."""
    try:
        objection = variant.cannot(check.request())
        if objection is not None:
            return _Finding(check.op.name, variant.name, "absent", objection)
        got, want = (jax.tree.leaves(jax.device_get(check.call(name))) for name in (variant.name, "reference"))
    except Exception as error:  # Whatever a broken installation throws is what the report is about.
        return _Finding(check.op.name, variant.name, "BROKEN", f"{type(error).__name__}: {error}".splitlines()[0])
    if all(np.allclose(g, w, rtol=1e-5, atol=1e-5) for g, w in zip(got, want, strict=True)):
        same = "is the reference" if variant.name == "reference" else "agrees with the reference"
        return _Finding(check.op.name, variant.name, "works", same)
    return _Finding(check.op.name, variant.name, "BROKEN", "does not agree with the reference")


def _ops() -> list[Op]:
    """Every op of every package under `curvax.kernels`."""
    packages = [module.name for module in pkgutil.iter_modules(kernels.__path__) if module.ispkg]
    modules = [importlib.import_module(f"{kernels.__name__}.{name}") for name in sorted(packages)]
    return [op for module in modules for op in getattr(module, "OPS", ())]


def _unchecked(op: Op) -> _Finding:
    return _Finding(op.name, ", ".join(variant.name for variant in op.variants), "unknown", "the doctor has no call")


def _calibrate(options: argparse.Namespace) -> int:
    """`curvax calibrate`: the planner's rates on this machine, measured and stored."""
    rates = calibrate.calibrate(lambda what: print(f"measuring {what}", file=sys.stderr))
    print(rates.name)
    print(calibrate.comparison(rates))
    print("nothing stored" if options.dry_run else f"stored in {machine.store(rates)}")
    return 0


def _bench(options: argparse.Namespace) -> int:
    """`curvax bench`: `python -m bench` in the checkout around the working folder."""
    checkout = next((folder for folder in (Path.cwd(), *Path.cwd().parents) if _is_checkout(folder)), None)
    if checkout is None:
        raise UsageError("the benchmarks live in bench/ of curvax's source checkout: run this inside one.")
    return subprocess.call([sys.executable, "-m", "bench", *options.rest], cwd=checkout)


def _is_checkout(folder: Path) -> bool:
    project = folder / "pyproject.toml"
    return (
        (folder / "bench" / "__main__.py").is_file()
        and project.is_file()
        and 'name = "curvax"' in project.read_text(encoding="utf-8")
    )
