"""Filling experts one after the other: whatever the keys are, demands and capacities are met, in E steps.

There are rows with demands d_t and E experts with C places each, and sum(d) = E * C, d <= E. With J experts left, the
next one takes all rows with d_t = J, which need every expert that is left, then those with the highest keys. This never
gets stuck: if sum(d) = J * C and d <= J, then

    rows with d = J:   J * their number <= sum(d) = J * C,  so at most C, and all of them find a place
    rows with d > 0:   J * their number >= sum(d) = J * C,  so at least C, and every place is taken

and both conditions hold again with J - 1 experts left.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moerouters_base_layers.largest import LOWEST, largest_per_expert


def place(keys_UE: Tensor, demand_U: Tensor, capacity: Tensor) -> Tensor:
    """bool [U, E] with demand_U (int64) true in each row and `capacity` (int64 0-d) in each column; high keys rather.

    The sum of demand_U is E * capacity, and no demand exceeds E. Columns are filled from the left; keys are finite.
    """
    E = keys_UE.shape[1]
    columns = []
    for left, key_U in zip(range(E, 0, -1), keys_UE.unbind(dim=1), strict=True):
        key_U = torch.where(demand_U == left, float("inf"), key_U)
        key_U = torch.where(demand_U > 0, key_U, LOWEST)
        taken_U1, _ = largest_per_expert(key_U.unsqueeze(1), capacity)
        demand_U = demand_U - taken_U1.squeeze(1).long()
        columns.append(taken_U1)
    return torch.cat(columns, dim=1)
