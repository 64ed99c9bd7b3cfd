"""Slow counterparts: the same rules in plain Python, one token and one expert at a time; and exact optima by scipy."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import linprog
from scipy.sparse import eye_array, kron, vstack
from torch import Tensor


def place_loops(
    margins: list[list[float]], held: list[list[bool]], demand: list[int], capacity: int
) -> list[list[bool]]:
    """Columns from the left; rows that need all that is left, then those that hold it, by falling margin, in order."""
    U, E = len(margins), len(margins[0])
    left, chosen = list(demand), [[False] * E for _ in range(U)]
    for e in range(E):
        wanting = [u for u in range(U) if left[u] > 0]
        must = [left[u] == E - e for u in range(U)]
        wanting.sort(key=lambda u: (0,) if must[u] else (1, not held[u][e], -margins[u][e]))
        for u in wanting[:capacity]:
            chosen[u][e] = True
            left[u] -= 1
    return chosen


def auction_loops(
    values: list[list[float]], demand: list[int], capacity: int, prices: list[float], *, rounds: int, epsilon: float
) -> tuple[list[set[int]], list[float]]:
    """(experts held by each row, prices). Bids of an expert are a dictionary from row to bid."""
    U, E = len(values), len(prices)
    bids: list[dict[int, float]] = [{} for _ in range(E)]
    prices = list(prices)
    for _ in range(rounds):
        made = []
        for u in range(U):
            open_experts = [e for e in range(E) if u not in bids[e]]
            missing = demand[u] - (E - len(open_experts))
            if missing == 0:
                continue
            worth = {e: values[u][e] - prices[e] for e in open_experts}
            falling = sorted(open_experts, key=lambda e: (-worth[e], e))
            made += [(u, e, values[u][e] - worth[falling[missing]] + epsilon) for e in falling[:missing]]
        for u, e, bid in made:
            bids[e][u] = bid
        for e in range(E):
            kept = sorted(bids[e], key=lambda u: (-bids[e][u], u))[:capacity]
            bids[e] = {u: bids[e][u] for u in kept}
            if len(kept) == capacity:
                prices[e] = min(bids[e].values(), default=0.0)
    return [{e for e in range(E) if u in bids[e]} for u in range(U)], prices


def best_sum(scores_TE: Tensor, top_k: int) -> float:
    """max sum s x with K experts for every token and floor(T K / E) or ceil(T K / E) tokens for every expert (HiGHS).

    The vertices of this polytope are whole, so the linear programme is the assignment problem.
    """
    T, E = scores_TE.shape
    per_token, per_expert = kron(eye_array(T), np.ones((1, E))), kron(np.ones((1, T)), eye_array(E))
    fewest, most = T * top_k // E, -(-T * top_k // E)
    found = linprog(
        -scores_TE.double().numpy().reshape(-1),
        A_eq=per_token,
        b_eq=np.full(T, top_k),
        A_ub=vstack([per_expert, -per_expert]),
        b_ub=np.concatenate([np.full(E, most), np.full(E, -fewest)]),
        bounds=(0, 1),
        method="highs",
    )
    assert found.status == 0, found.message
    return -float(found.fun)


def scores_of(kind: str, T: int, E: int, generator: torch.Generator) -> Tensor:
    """float64 [T, E]; all but the first three are there to make an auction suffer."""
    noise_TE = torch.randn(T, E, generator=generator, dtype=torch.float64)
    popularity_E = torch.linspace(2, -2, E, dtype=torch.float64)
    match kind:
        case "softmax":
            return (noise_TE + popularity_E).softmax(dim=-1)
        case "sigmoid":
            return (noise_TE + popularity_E).sigmoid()
        case "logits":
            return noise_TE + popularity_E
        case "all equal":
            return torch.zeros(T, E, dtype=torch.float64)
        case "one token repeated":
            return noise_TE[:1].expand(T, E).contiguous()
        case "two blocks":
            home_T1 = (torch.arange(T) % 2).unsqueeze(1)
            return 0.01 * noise_TE + (torch.arange(E) % 2 == home_T1).double()
        case "whole numbers":
            return noise_TE.round()
        case "huge":
            return 1e4 * (noise_TE + popularity_E)
    raise AssertionError(kind)


KINDS = ("softmax", "sigmoid", "logits", "all equal", "one token repeated", "two blocks", "whole numbers", "huge")
