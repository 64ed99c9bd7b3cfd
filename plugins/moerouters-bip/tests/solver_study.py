"""The tables of SOLVERS.md: `python plugins/moerouters-bip/tests/solver_study.py` (a minute or two, one thread).

The recipe: X ~ N(0, 1) [n, 64], W ~ N(0, 1) / 8 [64, E], popularity z ~ N(0, 1) [E], logits = X W + skew z. A sequence
of batches draws a new X each time, keeps W, and turns z by `drift` radians towards another popularity.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from moerouters.metrics import max_violation
from moerouters_bip import solve_dual

Solver = Callable[[Tensor, Tensor, int, int], Tensor]
"""(scores_TE, q_E, K, steps) -> q_E"""


class Recipe(NamedTuple):
    tokens: int
    num_experts: int
    top_k: int
    score: str
    """`softmax`, `sigmoid`, or `logits` for none."""
    skew: float
    noise: float = 1.0
    """Factor on X W."""

    def scores(self, seed: int, *, batch: int = 0, drift: float = 0.0) -> Tensor:
        random = torch.Generator().manual_seed(seed)
        W = torch.randn(64, self.num_experts, generator=random) / 8
        z_E, other_E = torch.randn(2, self.num_experts, generator=random)
        popularity_E = math.cos(drift * batch) * z_E + math.sin(drift * batch) * other_E
        X = torch.randn(self.tokens, 64, generator=torch.Generator().manual_seed(1000 * seed + batch + 1))
        logits_TE = self.noise * (X @ W) + self.skew * popularity_E
        return {"softmax": logits_TE.softmax(-1), "sigmoid": logits_TE.sigmoid(), "logits": logits_TE}[self.score]

    def __str__(self) -> str:
        n, E, K = self.tokens, self.num_experts, self.top_k
        spread = "" if self.noise == 1 else f", noise x {self.noise:g}"
        return f"{self.score}, n={n}, E={E}, K={K}, skew {self.skew:g}{spread}"


COLD = (
    Recipe(4096, 64, 8, "softmax", 1.0),
    Recipe(8192, 64, 8, "softmax", 1.0),
    Recipe(1024, 64, 8, "softmax", 1.0),
    Recipe(4096, 64, 8, "softmax", 0.1),
    Recipe(4096, 16, 4, "softmax", 1.0),
    Recipe(4096, 64, 8, "sigmoid", 1.0),
    Recipe(4096, 16, 4, "sigmoid", 1.0),
    Recipe(4096, 256, 8, "softmax", 1.0),
    Recipe(4096, 64, 8, "softmax", 3.0),
    Recipe(4096, 64, 8, "softmax", 4.0, noise=3.0),
)
WARM = (COLD[0], COLD[4], COLD[5], Recipe(4096, 64, 8, "softmax", 2.0, noise=3.0))


def plain(scores_TE: Tensor, q_E: Tensor, top_k: int, steps: int) -> Tensor:
    """Coordinate descent as it stands: each step is the first of a solve."""
    for _ in range(steps):
        q_E = solve_dual(scores_TE, q_E, top_k=top_k, iterations=1)
    return q_E


def further(scores_TE: Tensor, q_E: Tensor, top_k: int, steps: int) -> Tensor:
    """What the router does: steps after the first go further near balance."""
    return solve_dual(scores_TE, q_E, top_k=top_k, iterations=steps)


def always_further(scores_TE: Tensor, q_E: Tensor, top_k: int, steps: int) -> Tensor:
    """Each step after the first goes half its length further, whatever the balance."""
    for step in range(steps):
        q_E = q_E + (1.5 if step else 1.0) * (solve_dual(scores_TE, q_E, top_k=top_k, iterations=1) - q_E)
    return q_E


SOLVERS: dict[str, Solver] = {"plain": plain, "1.5 always": always_further, "default": further}


def violation(scores_TE: Tensor, q_E: Tensor, top_k: int) -> float:
    """MaxVio of top-K on s - q."""
    ids_TK = (scores_TE - q_E).topk(top_k, dim=1).indices
    return float(max_violation(torch.bincount(ids_TK.reshape(-1), minlength=q_E.shape[0])))


def cold(recipe: Recipe, solver: Solver, steps: int, seeds: range) -> list[float]:
    zero_E = torch.zeros(recipe.num_experts)
    scores = (recipe.scores(seed) for seed in seeds)
    return [violation(s_TE, solver(s_TE, zero_E, recipe.top_k, steps), recipe.top_k) for s_TE in scores]


def warm(recipe: Recipe, solver: Solver, steps: int, seeds: range, *, drift: float, batches: int = 10) -> list[float]:
    """MaxVio of the later half of the batches, each solved from the q of the one before."""
    found = []
    for seed in seeds:
        q_E = torch.zeros(recipe.num_experts)
        for batch in range(batches):
            scores_TE = recipe.scores(seed, batch=batch, drift=drift)
            q_E = solver(scores_TE, q_E, recipe.top_k, steps)
            if batch >= batches // 2:
                found.append(violation(scores_TE, q_E, recipe.top_k))
    return found


def shown(values: list[float]) -> str:
    return f"{statistics.mean(values):.4f} ({max(values):.4f})"


def tables() -> Iterator[str]:
    yield "Cold start, mean (worst) of 6 seeds:\n"
    steps = (1, 2, 4, 6, 8, 14)
    yield "| scores | steps | " + " | ".join(f"T={T}" for T in steps) + " |\n|---|---|" + "---|" * len(steps)
    for recipe in COLD:
        for name, solver in SOLVERS.items():
            cells = [shown(cold(recipe, solver, T, range(6))) for T in steps]
            yield f"| {recipe} | {name} | " + " | ".join(cells) + " |"
    yield "\nWarm start, batches 6 to 10 of 3 seeds, mean (worst):\n"
    yield "| scores | drift | steps | T=2 | T=4 |\n|---|---|---|---|---|"
    for recipe in WARM:
        for drift in (0.0, 0.1):
            for name, solver in SOLVERS.items():
                cells = [shown(warm(recipe, solver, T, range(3), drift=drift)) for T in (2, 4)]
                yield f"| {recipe} | {drift:g} | {name} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in tables():
        print(line, flush=True)
