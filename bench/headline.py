"""The tables of measured outcomes in README.md, docs/choose.md and docs/claims.md, made from committed rows.

python -m bench.headline

Each page has the lines `<!-- rows: begin -->` and `<!-- rows: end -->`, and this writes what stands between them.
`tests/bench/test_headline.py` compares the committed pages with what the rows make.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator

from bench import schema
from bench.claims import claims
from bench.schema import Row

ROOT = pathlib.Path(__file__).parents[1]
BEGIN, END = "<!-- rows: begin -->\n", "<!-- rows: end -->"
TUNED = "AdamW, best of 12 rates"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One line of README's table: the same measurement of curvax and of a peer.

    Attributes:
      what: the measurement, in words.
      suite, case, x, metric: which rows.
      ours, peer: how the providers of the two rows begin.
      ours_is, peer_is: what the table calls them.
    """

    what: str
    suite: str
    case: str
    x: str
    metric: str
    ours: str
    peer: str
    ours_is: str
    peer_is: str

    def line(self) -> str:
        """The line of the table."""
        ours, peer = (number(self._value(provider)) for provider in (self.ours, self.peer))
        command = f"`python -m bench {self.suite}`"
        return f"| {self.what} | {ours} ({self.ours_is}) | {peer} ({self.peer_is}) | {command} |"

    def _value(self, provider: str) -> float:
        return one(self.suite, self.case, self.x, self.metric, provider)


def untuned(what: str, problem: str, metric: str) -> Comparison:
    """Defaults of `gauss_newton` beside tuned AdamW, two seconds of processor time each."""
    return Comparison(
        what, "untuned", problem, "2 s, cpu", metric, "gauss_newton", "adamw", "`gauss_newton`, defaults", TUNED
    )


SECONDS = "s to tuned adamw's loss"
COMPARISONS = (
    untuned("PINN, 2-D Poisson: relative L2 error after 2 s", "poisson2d", "relative L2 error"),
    untuned("neural wave function: error of the energy after 2 s", "wave_function", "error of the energy"),
    untuned("tabular regression: seconds to tuned AdamW's last loss", "tabular", SECONDS),
    untuned("logistic regression: the same", "logistic", SECONDS),
    untuned("recurrent network: the same", "recurrent", SECONDS),
    untuned("digits, small batches: training loss after 2 s", "digits", "training loss"),
    untuned("small transformer: training loss after 2 s", "transformer", "training loss"),
    Comparison(
        "language model, 131,072 tokens a step: steps to a test loss of 2", "layerwise",
        "language model 0.3M, 2048 sequences, to test loss 2", "131072 tokens/step", "steps",
        "full_gn", "soap", "`full_gn`", "SOAP",
    ),
    Comparison(
        "exact Gauss-Newton step, MLP 784-256-256-10, batch 128: ms", "structure", "egn_ce, mlp 784-256-256-10",
        "batch 128", "ms/step", "curvax", "python-somax", "`egn_ce`", "python-somax",
    ),
    Comparison(
        "PINN, 10-D Poisson: relative L2 error after 6 s", "physics", "Poisson 10-D", "6 s, wall", "relative L2 error",
        "gauss_newton", "ENGD-W", "`gauss_newton`, defaults", "natural gradient, damping tuned",
    ),
    Comparison(
        "exact step of a PINN, 900 + 120 points: ms", "physics", "egn step, 2-D Poisson, 2-64-64-1",
        "900 + 120 points", "ms/step", "curvax, terms", "an expert's own", "`egn`", "an expert's own JAX",
    ),
)  # fmt: skip


def comparisons() -> Iterator[str]:
    """README's table."""
    yield "| what | curvax | peer | command |"
    yield "|---|---|---|---|"
    yield from (comparison.line() for comparison in COMPARISONS)


PROBLEMS = {
    "poisson2d": "PINN, 2-D Poisson equation",
    "wave_function": "energy of a neural wave function",
    "tabular": "regression on a table",
    "logistic": "logistic regression",
    "factorization": "matrix factorization",
    "recurrent": "recurrent network",
    "autoencoder": "autoencoder of digits",
    "digits": "digits, minibatches",
    "cnn": "small convolutional network, minibatches",
    "transformer": "small transformer, minibatches",
}
METHODS = ("adamw", "gauss_newton", "kfac", "ekfac", "sophia_h", "full_gn")


def problems() -> Iterator[str]:
    """The table of docs/choose.md: where each method ended, over its start, with the best one in bold."""
    yield "| problem | " + " | ".join(f"`{method}`" for method in METHODS).replace("`adamw`", "tuned AdamW") + " |"
    yield "|---|" + "---|" * len(METHODS)
    for problem, meaning in PROBLEMS.items():
        ends = [one("untuned", problem, "2 s, cpu", "final loss over start", method) for method in METHODS]
        best = number(min(ends))
        cells = (f"**{text}**" if text == best else text for text in map(number, ends))
        yield f"| {meaning} | {' | '.join(cells)} |"


TABLES: dict[str, Callable[[], Iterator[str]]] = {
    "README.md": comparisons,
    "docs/choose.md": problems,
    "docs/claims.md": claims,
}


def number(value: float) -> str:
    """Two digits, and no exponent where a reader needs none."""
    if value == float("inf"):
        return "never"
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}" if value >= 0.01 else f"{value:.1e}"


def one(suite: str, case: str, x: str, metric: str, provider: str) -> float:
    """The median of the one row that these select; `provider` is its provider, or how that begins.

    Raises:
      LookupError: no row, or several, are so.
    """
    rows = [r for r in _rows(suite) if (r.case, r.x, r.metric) == (case, x, metric)]
    chosen = [r for r in rows if r.provider == provider] or [r for r in rows if r.provider.startswith(provider)]
    if len(chosen) != 1:
        raise LookupError(f"{len(chosen)} rows of {suite} are of {case!r} [{x}], {provider!r}, in {metric!r}.")
    return chosen[0].p50


@functools.cache
def _rows(suite: str) -> list[Row]:
    return schema.read(schema.RESULTS / f"{suite}.jsonl")


def with_table(text: str, lines: Iterator[str]) -> str:
    """The page with these lines between its two marks."""
    before, rest = text.split(BEGIN)
    behind = rest.split(END)[1]
    return before + BEGIN + "\n" + "\n".join(lines) + "\n\n" + END + behind


def main() -> None:
    """Writes the tables of all pages."""
    for name, lines in TABLES.items():
        page = ROOT / name
        page.write_text(with_table(page.read_text(), lines()))
        print(page)


if __name__ == "__main__":
    main()
