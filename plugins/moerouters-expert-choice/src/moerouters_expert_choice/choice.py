"""The choice of experts among tokens (arXiv:2202.09368, section 3.2), and the thresholds that stand for it in eval.

    G, I = TopK(S^T, C),  C = floor(n K capacity / E):   every expert takes its C best of n tokens

Scores of tokens that may not be chosen are -inf. A share is the fraction of all tokens that one expert takes,
K * capacity / E, as a quotient of integers: in floats 90 * 0.7 is less than 63.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from moerouters.gating import take_along_experts
from moerouters.kernels.order_statistic import kth_largest_per_expert
from moerouters.kernels.topk import topk_lowest_id

LOWEST = -float("inf")


def share_of(*, top_k: int, num_experts: int, capacity: float) -> Fraction:
    """K * capacity / E, at most 1."""
    return min(Fraction(capacity).limit_denominator(1000) * top_k / num_experts, Fraction(1))


def choose_tokens(scores_TE: Tensor, tokens: Tensor, share: Fraction) -> tuple[Tensor, Tensor]:
    """(token ids [N], expert ids [N]), N = E * floor(T share): every expert's floor(tokens * share) best tokens.

    tokens: int64 0-d, how many count, at most T. Places past what an expert takes are empty: expert id E. Among equal
    scores the lower token id goes first.
    """
    T, E = scores_TE.shape
    places = T * share.numerator // share.denominator
    scores_ET = scores_TE.t().contiguous()
    tokens_EC = topk_lowest_id(scores_ET, places)
    places_C = torch.arange(places, device=scores_TE.device)
    taken_EC = places_C < tokens * share.numerator // share.denominator
    taken_EC = taken_EC & (take_along_experts(scores_ET, tokens_EC) > LOWEST)
    experts_E1 = torch.arange(E, device=scores_TE.device).unsqueeze(1)
    return tokens_EC.reshape(-1), torch.where(taken_EC, experts_E1, E).reshape(-1)


def thresholds(scores_TE: Tensor, tokens: Tensor, share: Fraction) -> Tensor:
    """[E]: per expert the score that just a share of its tokens reaches.

    With c = tokens * share: the middle between its c-th and next best score, or where c is not whole, the one at place
    ceil(c). So a batch given twice says what it said once. An expert that no token may choose gets the largest of all.
    """
    wanted = tokens * share.numerator
    rank = torch.div(wanted + share.denominator - 1, share.denominator, rounding_mode="floor")
    last_E, next_E = kth_largest_per_expert(scores_TE, rank, count=2)
    found_E = torch.where(wanted % share.denominator == 0, (last_E + next_E) / 2, last_E)
    return torch.where((scores_TE > LOWEST).any(dim=0), found_E, found_E.amax())


def reached(scores_TE: Tensor, threshold_E: Tensor) -> Tensor:
    """scores_TE where they reach their expert's threshold, -inf elsewhere."""
    return torch.where(scores_TE >= threshold_E, scores_TE, LOWEST)
