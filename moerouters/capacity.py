"""Dropping has one owner: `limit_capacity`. Balancers never drop, and they see the load before it."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from moerouters.errors import ConfigError
from moerouters.types import Assignment

DropPolicy = Literal["position", "weight"]


def limit_capacity(assignment: Assignment, capacity: int, policy: DropPolicy = "position") -> Assignment:
    """Keep at most `capacity` tokens per expert; the other places become empty (id E, weight 0).

    Who keeps a place: `position` - first choices before second choices, then in token order (GShard); `weight` - the
    larger combine weight, ties by token. load_E stays as the router made it; `dropped` (int64 0-d) says how many pairs
    were taken away, here and before. Nothing is renormalised. Raises ConfigError for a negative capacity or an unknown
    policy.
    """
    if capacity < 0 or policy not in ("position", "weight"):
        raise ConfigError(
            f"limit_capacity was given capacity={capacity}, policy={policy!r}.",
            why="capacity is the number of tokens an expert keeps; policies are 'position' and 'weight'",
            fix="pass a capacity >= 0, for instance ceil(1.25 * tokens * top_k / num_experts)",
        )
    E = assignment.num_experts
    _, expert_ids_N, weights_N = assignment.pairs()
    if policy == "position":
        priority_N = _by_choice(assignment)
    else:
        priority_N = weights_N.detach().argsort(descending=True, stable=True)
    # Queue position of a pair = its distance to the first pair of the same expert, both in order of priority.
    experts_N, order_N = torch.sort(expert_ids_N.index_select(0, priority_N), stable=True)
    places_N = torch.arange(experts_N.numel(), device=experts_N.device)
    queue_N = places_N - torch.searchsorted(experts_N, experts_N)
    over_N = (queue_N >= capacity) & (experts_N < E)
    drop_N = torch.zeros_like(over_N).scatter(0, priority_N.index_select(0, order_N), over_N)
    drop = drop_N.reshape(assignment.expert_ids.shape)
    return replace(
        assignment,
        expert_ids=torch.where(drop, E, assignment.expert_ids),
        # masked_fill, not a product: a dropped pair's weight must get no gradient either.
        weights=assignment.weights.masked_fill(drop, 0),
        dropped=drop.sum() if assignment.dropped is None else drop.sum() + assignment.dropped,
    )


def _by_choice(assignment: Assignment) -> Tensor:
    """Pair numbers with all first choices first; free pairs keep their order."""
    numbers = torch.arange(assignment.expert_ids.numel(), device=assignment.expert_ids.device)
    if assignment.expert_ids.dim() == 1:
        return numbers
    return numbers.reshape(assignment.expert_ids.shape).t().reshape(-1)
