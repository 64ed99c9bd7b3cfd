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

from moerouters_base_layers.auction_cpu import auction_cpu
from moerouters_base_layers.bidding import bids_of, epsilon_of
from moerouters_base_layers.largest import LOWEST, largest_per_expert


def auction(
    values_UE: Tensor, demand_U: Tensor, capacity: Tensor, price_E: Tensor, *, top_k: int, rounds: int
) -> tuple[Tensor, Tensor]:
    """(held bool [U, E], price [E]) after at most `rounds` rounds that start at `price_E` with nothing assigned.

    demand_U: int64, experts that a row wants: at most top_k, the last row at most E - 1. capacity: int64 0-d, C. On a
    CPU it stops once all is assigned; elsewhere the rounds left over change nothing, and nobody waits.
    """
    run = auction_cpu if values_UE.device.type == "cpu" else auction_anywhere
    return run(values_UE, demand_U, capacity, price_E, top_k=top_k, rounds=rounds)


def auction_anywhere(
    values_UE: Tensor, demand_U: Tensor, capacity: Tensor, price_E: Tensor, *, top_k: int, rounds: int
) -> tuple[Tensor, Tensor]:
    """As `auction`: every round is of all rows and all experts, so that the host need not know whom it concerns."""
    epsilon, tokens = epsilon_of(values_UE), len(demand_U) - 1
    bids_UE = torch.full_like(values_UE, LOWEST)
    for _ in range(rounds):
        held_UE = bids_UE > LOWEST
        missing_U = demand_U - held_UE.sum(dim=1)
        wanted_UE, offers_UE = bids_of(values_UE, held_UE, missing_U, price_E, epsilon, top_k=top_k, tokens=tokens)
        bids_UE = torch.where(wanted_UE, offers_UE, bids_UE)
        kept_UE, lowest_E = largest_per_expert(bids_UE, capacity)
        bids_UE = torch.where(kept_UE, bids_UE, LOWEST)
        price_E = torch.where(kept_UE.sum(dim=0) == capacity, lowest_E, price_E)
    return bids_UE > LOWEST, price_E
