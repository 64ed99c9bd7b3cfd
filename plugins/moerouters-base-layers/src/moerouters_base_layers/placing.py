"""Filling experts one after the other: whatever the margins are, demands and capacities are met, in E steps.

There are rows with demands d_t and E experts with C places each, and sum(d) = E * C, d <= E. With J experts left, the
next one takes all rows with d_t = J, which need every expert that is left, then those that hold it, then those with the
largest margins. This never gets stuck: if sum(d) = J * C and d <= J, then

    rows with d = J:   J * their number <= sum(d) = J * C,  so at most C, and all of them find a place
    rows with d > 0:   J * their number >= sum(d) = J * C,  so at least C, and every place is taken

and both conditions hold again with J - 1 experts left. Where every row holds what it wants, it keeps that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moerouters_base_layers.largest import LOWEST, largest_per_expert


def place(margin_EU: Tensor, held_EU: Tensor, demand_U: Tensor, capacity: Tensor) -> Tensor:
    """bool [E, U]: for each row u demand_U (int64) experts, for each expert `capacity` (int64 0-d) rows.

    held_EU: bool, at most `capacity` rows of an expert. The sum of demand_U is E * capacity, and no demand exceeds E.
    Experts are filled in the order in which they are given; margins are finite.
    """
    span = 1 + margin_EU.amax() - margin_EU.amin()
    taken = []
    for left, margin_U, held_U in zip(range(len(held_EU), 0, -1), margin_EU, held_EU, strict=True):
        open_U, must_U = demand_U > 0, demand_U == left
        taken_U = held_U & open_U
        if not _settled(taken_U, must_U, capacity):
            key_U = torch.where(held_U, margin_U + span, margin_U)
            key_U = torch.where(must_U, float("inf"), torch.where(open_U, key_U, LOWEST))
            taken_U = largest_per_expert(key_U.unsqueeze(1), capacity)[0].squeeze(1)
        demand_U = demand_U - taken_U.long()
        taken.append(taken_U)
    return torch.stack(taken)


def _settled(held_U: Tensor, must_U: Tensor, capacity: Tensor) -> bool:
    """Whether those that hold an expert fill it, and nobody has to be let in; not asked where asking means waiting."""
    return held_U.device.type == "cpu" and bool(held_U.sum() == capacity) and not bool((must_U & ~held_U).any())
