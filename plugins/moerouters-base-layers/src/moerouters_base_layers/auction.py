"""Auction rounds (Bertsekas): tokens without an expert raise the price of the one they gain most from.

    token t, with room for m more experts, looks at what they are worth to it, value - price. It bids for the best m as
    much as leaves it no better off than with the next best one, and epsilon more:  bid_te = value_te - w_t + epsilon
    expert e keeps the C highest bids it has and was given; once it has C, its price is the lowest of them

All tokens bid at the same time (Jacobi). Once all have what they want, the assignment is within epsilon times the
number of pairs of the best one, whatever the prices were at the start. How many rounds that takes is not known: one
token can push out one neighbour after the other, epsilon by epsilon. So rounds are counted here, and `placing` ends it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moerouters.gating import take_along_experts
from moerouters.kernels.topk import topk_lowest_id
from moerouters_base_layers.largest import LOWEST, largest_per_expert

EPSILON = 2.0**-12
"""Of the span of values. Of the best sum 2**-8 leaves up to 0.01% unreached, 2**-12 0.0002%; 2**-16 needs more rounds,
and leaves 0.05% after 16 (README)."""


def auction(
    values_UE: Tensor, demand_U: Tensor, capacity: Tensor, price_E: Tensor, *, top_k: int, rounds: int
) -> tuple[Tensor, Tensor]:
    """(held bool [U, E], price [E]) after at most `rounds` rounds that start at `price_E` with nothing assigned.

    demand_U: int64, experts that a row wants: at most top_k, the last row at most E - 1. capacity: int64 0-d, C. On a
    CPU it stops once all is assigned; elsewhere the rounds left over change nothing, and nobody waits.
    """
    E = values_UE.shape[1]
    epsilon = (values_UE.amax() - values_UE.amin()) * EPSILON
    bids_UE = torch.full_like(values_UE, LOWEST)
    for _ in range(rounds):
        held_UE = bids_UE > LOWEST
        missing_U = demand_U - held_UE.sum(dim=1)
        if missing_U.device.type == "cpu" and not bool(missing_U.any()):
            break
        worth_UE = torch.where(held_UE, LOWEST, values_UE - price_E)
        parts = zip(worth_UE.tensor_split([-1]), missing_U.tensor_split([-1]), (top_k, E - 1), strict=True)
        wanted, fallback = zip(*[_wishes(worth, missing, most) for worth, missing, most in parts], strict=True)
        offers_UE = values_UE - torch.cat(fallback) + epsilon
        bids_UE = torch.where(torch.cat(wanted), offers_UE, bids_UE)
        kept_UE, lowest_E = largest_per_expert(bids_UE, capacity)
        bids_UE = torch.where(kept_UE, bids_UE, LOWEST)
        price_E = torch.where(kept_UE.sum(dim=0) == capacity, lowest_E, price_E)
    return bids_UE > LOWEST, price_E


def _wishes(worth_UE: Tensor, missing_U: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """(wanted bool [U, E], w [U, 1]): each row's best `missing` (at most `most`) experts, and the worth of the next."""
    ids_UM = topk_lowest_id(worth_UE, most + 1)
    missing_U1 = missing_U.unsqueeze(1)
    next_U1 = take_along_experts(worth_UE, ids_UM).gather(1, missing_U1)
    places_M = torch.arange(most + 1, device=ids_UM.device)
    wanted_UE = torch.zeros_like(worth_UE, dtype=torch.bool).scatter(1, ids_UM, places_M < missing_U1)
    return wanted_UE, next_U1
