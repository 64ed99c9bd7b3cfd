"""Who is active at inference: S_i is an expert's probability at a token, E the number of experts.

Assignments have slots in order of falling probability, as many as a token can fill at most; a token that no expert
passes (only possible from eps = 1 on) gets its best.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moerouters import Gating
from moerouters.gating import take_along_experts


def passing(shares: Tensor, eps: float, *, num_experts: int) -> Tensor:
    """bool: E * S_i > eps."""
    return shares * num_experts > eps


def most_passing(eps: float, *, num_experts: int) -> int:
    """The most experts of one token that can pass, since shares sum to 1; at least 1."""
    return num_experts if eps <= 1 else max(1, int(num_experts / eps))


def best(gating: Gating, ranking_TE: Tensor, width: int) -> Tensor:
    """[T, width] ids of the best; E where the gating bars experts, whose ranking is -inf."""
    ids_TK = gating.top(ranking_TE, width)
    return torch.where(take_along_experts(ranking_TE, ids_TK) == -float("inf"), gating.num_experts, ids_TK)


def above_threshold(gating: Gating, shares_TE: Tensor, eps: float) -> Tensor:
    """[T, K] ids of the experts that pass, K what `most_passing` says."""
    E = gating.num_experts
    ids_TK = best(gating, shares_TE, most_passing(eps, num_experts=E))
    passes_TK = passing(take_along_experts(shares_TE, ids_TK.clamp(max=E - 1)), eps, num_experts=E)
    passes_TK = passes_TK | (torch.arange(ids_TK.shape[1], device=ids_TK.device) == 0)
    return torch.where(passes_TK, ids_TK, E)


def average_above_threshold(gating: Gating, shares_TE: Tensor, eps: float, valid_T: Tensor) -> Tensor:
    """[T, K] ids of every token's best experts, as many as pass on average over the valid tokens (rounded to whole)."""
    E = gating.num_experts
    passing_TK = above_threshold(gating, shares_TE, eps) < E
    total, tokens = (passing_TK & valid_T.unsqueeze(1)).sum(), valid_T.sum()
    average = (2 * total + tokens) // (2 * tokens).clamp_min(1)
    ids_TK = best(gating, shares_TE, passing_TK.shape[1])
    return torch.where(torch.arange(ids_TK.shape[1], device=ids_TK.device) < average, ids_TK, E)
