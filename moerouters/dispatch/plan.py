"""DispatchPlan: how routed pairs are ordered by expert, as data. Pure, no communication, no host synchronisation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moerouters.capabilities import AssignmentKind
from moerouters.kernels.counts import count_experts
from moerouters.types import Assignment


@dataclass(frozen=True, kw_only=True)
class DispatchPlan:
    """The N pairs of an assignment, stably sorted by expert; empty pairs stand last and belong to no expert."""

    num_tokens: int
    slots_per_token: int | None
    """K (E for dense) where pair n belongs to token n // K; None for free pairs."""
    token_ids_N: Tensor
    """int64, token of pair n, in the assignment's own order."""
    order_N: Tensor
    """int64, order_N[r] is the pair that row r carries."""
    inverse_N: Tensor
    """int64, inverse_N[order_N[r]] = r."""
    kept_load_E: Tensor
    """int64, rows per expert; the rows of expert e are [kept_load_E[:e].sum(), kept_load_E[:e+1].sum())."""


def make_plan(assignment: Assignment) -> DispatchPlan:
    """Order the pairs of an assignment by expert."""
    token_ids_N, expert_ids_N, _ = assignment.pairs()
    order_N = torch.sort(expert_ids_N, stable=True).indices
    inverse_N = torch.empty_like(order_N).scatter(0, order_N, torch.arange(order_N.numel(), device=order_N.device))
    by_slot = assignment.kind is not AssignmentKind.PAIRS
    return DispatchPlan(
        num_tokens=assignment.num_tokens,
        slots_per_token=assignment.expert_ids.shape[1] if by_slot else None,
        token_ids_N=token_ids_N,
        order_N=order_N,
        inverse_N=inverse_N,
        kept_load_E=count_experts(expert_ids_N, assignment.num_experts),
    )
