"""What rows bid for experts in a round of the auction."""

from __future__ import annotations

import torch
from torch import Tensor

from moerouters.gating import take_along_experts
from moerouters.kernels.topk import topk_lowest_id
from moerouters_base_layers.largest import LOWEST

EPSILON = 2.0**-12
"""Of the span of values. Of the best sum 2**-8 leaves up to 0.01% unreached, 2**-12 0.0002%; 2**-16 needs more rounds,
and leaves 0.05% after 16 (README)."""


def epsilon_of(values_UE: Tensor) -> Tensor:
    """0-d: by how much a bid goes past the point where a row would as soon have the next best expert."""
    return (values_UE.amax() - values_UE.amin()) * EPSILON


def bids_of(
    values_UE: Tensor, held_UE: Tensor, missing_U: Tensor, price_E: Tensor, epsilon: Tensor, *, top_k: int, tokens: int
) -> tuple[Tensor, Tensor]:
    """(where a row bids, bool [U, E]; what it would bid, [U, E]): for the best `missing` of what it does not hold.

    The first `tokens` rows miss top_k experts at most, those after them E - 1.
    """
    worth_UE = torch.where(held_UE, LOWEST, values_UE - price_E)
    wanted_UE, _, next_U1 = best_of(worth_UE, missing_U, top_k=top_k, tokens=tokens)
    return wanted_UE, values_UE - next_U1 + epsilon


def best_of(worth_UE: Tensor, count_U: Tensor, *, top_k: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """(bool [U, E], [U, 1], [U, 1]): each row's best `count` experts, what the last of them is worth, and the next one.

    Where count is 0, the last one is the best. The first `tokens` rows count to top_k at most, those after them to
    E - 1.
    """
    E = worth_UE.shape[1]
    parts = zip(worth_UE.tensor_split([tokens]), count_U.tensor_split([tokens]), (top_k, E - 1), strict=True)
    found = zip(*[_best_of(worth, count, most) for worth, count, most in parts], strict=True)
    wanted_UE, last_U1, next_U1 = (torch.cat(each) for each in found)
    return wanted_UE, last_U1, next_U1


def _best_of(worth_UE: Tensor, count_U: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    ids_UM = topk_lowest_id(worth_UE, most + 1)
    falling_UM, count_U1 = take_along_experts(worth_UE, ids_UM), count_U.unsqueeze(1)
    places_M = torch.arange(most + 1, device=ids_UM.device)
    wanted_UE = torch.zeros_like(worth_UE, dtype=torch.bool).scatter(1, ids_UM, places_M < count_U1)
    return wanted_UE, falling_UM.gather(1, (count_U1 - 1).clamp_min(0)), falling_UM.gather(1, count_U1)
