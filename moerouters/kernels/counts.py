"""Tokens per expert."""

from __future__ import annotations

import torch
from torch import Tensor


def count_experts(expert_ids: Tensor, num_experts: int) -> Tensor:
    """int64 [E]: how often each id stands in `expert_ids` (any shape); the id E, an empty place, counts nowhere.

    scatter_add of integers: exact, order-free, and unlike bincount of a known shape under torch.compile. Never a
    [T, K, E] one-hot (300 ms against 1 ms at T = 65536, K = 8, E = 64 on a CPU core).
    """
    ids_N = expert_ids.reshape(-1)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids_N.device)
    return counts.scatter_add(0, ids_N, torch.ones_like(ids_N))[:num_experts]


def count_experts_torch(expert_ids: Tensor, num_experts: int) -> Tensor:
    """Reference of `count_experts`, from the definition."""
    ids_N = expert_ids.reshape(-1, 1)
    return (ids_N == torch.arange(num_experts, device=ids_N.device)).sum(dim=0)
