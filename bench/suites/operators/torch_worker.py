"""Runs under a Python with torch: `torch_worker.py CASE WIDTHS BATCH` computes a case with each package that has it.

It answers with the names of these packages, then, whenever it reads a name, computes the case once and answers null.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn


def network(widths: list[int]) -> nn.Sequential:
    """The workload's network with its very weights (`bench.workloads.Workload.params`)."""
    rng, layers = np.random.default_rng(0), []
    for a, b in itertools.pairwise(widths):
        layer = nn.Linear(a, b)
        weight = np.ascontiguousarray((rng.normal(size=(a, b)) * np.sqrt(2 / a)).T)
        layer.weight.data = torch.tensor(weight, dtype=torch.float32)
        layer.bias.data.zero_()
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def batch(widths: list[int], size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The workload's batch."""
    rng = np.random.default_rng(1)
    x = torch.tensor(rng.normal(size=(size, widths[0])), dtype=torch.float32)
    return x, torch.tensor(rng.integers(0, widths[-1], size))


def cases(widths: list[int], size: int) -> dict[str, dict[str, Callable[[], Any]]]:
    """By case, functions that compute it by package."""
    model, (x, y) = network(widths), batch(widths, size)
    return {**_curvlinops(model, x, y), **_laplace(model, x, y)}


def _curvlinops(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> dict[str, dict[str, Callable[[], Any]]]:
    import curvlinops
    from scipy.sparse.linalg import eigsh

    params = [p for p in model.parameters() if p.requires_grad]
    loss = nn.CrossEntropyLoss()
    # Checks of determinism compute everything twice.
    ggn = curvlinops.GGNLinearOperator(model, loss, params, [(x, y)], check_deterministic=False)
    n = sum(p.numel() for p in params)
    one, eight = torch.ones(n), torch.randn(n, 8)
    return {
        "Gauss-Newton product": {"curvlinops": lambda: ggn @ one},
        "8 Gauss-Newton products": {"curvlinops": lambda: ggn @ eight},
        "K-FAC fit": {
            "curvlinops": lambda: (
                curvlinops.KFACLinearOperator(
                    model, loss, params, [(x, y)], check_deterministic=False, fisher_type="type-2"
                )
                @ one
            )
        },
        "trace to 1 %": {"curvlinops": lambda: curvlinops.xtrace(ggn, num_matvecs=64)},
        "top 10 eigenpairs": {"curvlinops": lambda: eigsh(ggn.to_scipy(), k=10, which="LA", tol=1e-3)},
    }


def _laplace(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> dict[str, dict[str, Callable[[], Any]]]:
    from laplace import Laplace
    from torch.utils.data import DataLoader, TensorDataset

    loader = DataLoader(TensorDataset(x, y), batch_size=len(x))

    def fitted() -> Any:
        posterior = Laplace(model, "classification", subset_of_weights="all", hessian_structure="kron")
        posterior.fit(loader)
        return posterior

    posterior = fitted()
    return {
        "Laplace fit and evidence, K-FAC": {"laplace-torch": lambda: fitted().log_marginal_likelihood()},
        "Laplace predictive, K-FAC, 32 points": {
            "laplace-torch": lambda: posterior._glm_predictive_distribution(x[:32])
        },
    }


def agreement(widths: list[int], size: int) -> dict[str, Any]:
    """Evidence and functional covariances of five points by laplace-torch, by the structure of the curvature."""
    from laplace import Laplace
    from torch.utils.data import DataLoader, TensorDataset

    model, (x, y) = network(widths), batch(widths, size)
    found: dict[str, Any] = {}
    for structure in ("full", "diag", "kron"):
        posterior = Laplace(model, "classification", subset_of_weights="all", hessian_structure=structure)
        posterior.fit(DataLoader(TensorDataset(x, y), batch_size=size))
        _, covariance = posterior._glm_predictive_distribution(x[:5])
        evidence = posterior.log_marginal_likelihood()
        found[structure] = [evidence.item(), covariance.detach().numpy().tolist()]
    return found


def main() -> None:
    """Answers until its input ends; the case "agreement" answers once with numbers."""
    case, widths, size = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
    if case == "agreement":
        print(json.dumps(agreement(widths, size)), flush=True)
        return
    functions = cases(widths, size).get(case, {})
    print(json.dumps(list(functions)), flush=True)
    for line in sys.stdin:
        functions[line.strip()]()
        print("null", flush=True)


if __name__ == "__main__":
    main()
