"""Load metrics, on loads as data: no globals, no trackers, no logging library.

For a load_E: MaxVio = max/mean - 1, MinVio = min/mean - 1 (arXiv:2408.15664, Eq. 4). Over a run: AvgMaxVio and
SupMaxVio are the mean and the maximum of MaxVio over the training batches (arXiv:2502.15451), per layer; a model's
value is the mean over its layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def max_violation(load_E: Tensor) -> Tensor:
    """float64 [...]: max load / mean load - 1 over the last axis; 0 where nothing was routed."""
    return _relative(load_E, load_E.amax(dim=-1))


def min_violation(load_E: Tensor) -> Tensor:
    """float64 [...]: min load / mean load - 1 over the last axis, -1 with a dead expert; 0 where nothing was routed."""
    return _relative(load_E, load_E.amin(dim=-1))


def dead_experts(load_E: Tensor) -> Tensor:
    """int64 [...]: experts without a token; all of them where nothing was routed."""
    return (load_E == 0).sum(dim=-1)


def load_cv(load_E: Tensor) -> Tensor:
    """float64 [...]: standard deviation of the load over its mean (population form); 0 where nothing was routed."""
    load = load_E.double()
    mean = load.mean(dim=-1)
    return torch.where(mean > 0, load.std(dim=-1, unbiased=False) / mean.clamp_min(1e-300), 0.0)


def router_entropy(probabilities_TE: Tensor, valid_T: Tensor | None = None) -> Tensor:
    """0-d: mean entropy in nats of the rows of probabilities_TE, over valid tokens; 0 without any."""
    entropy_T = torch.special.entr(probabilities_TE).sum(dim=-1)
    if valid_T is None:
        valid_T = torch.ones_like(entropy_T, dtype=torch.bool)
    return torch.where(valid_T, entropy_T, 0.0).sum() / valid_T.sum().clamp_min(1)


def _relative(load_E: Tensor, extreme: Tensor) -> Tensor:
    mean = load_E.double().mean(dim=-1)
    return torch.where(mean > 0, extreme.double() / mean.clamp_min(1e-300) - 1, 0.0)


@dataclass(frozen=True, kw_only=True)
class RunBalance:
    """Balance over a run, each field with one float per layer; see the module docstring."""

    avg_max_vio: list[float]
    sup_max_vio: list[float]
    last_min_vio: list[float]
    last_dead_experts: list[int]

    @classmethod
    def of(cls, loads_SLE: Tensor) -> RunBalance:
        """From the loads of S >= 1 steps, L layers, E experts (int64, on any device)."""
        max_vio_SL = max_violation(loads_SLE)
        return cls(
            avg_max_vio=max_vio_SL.mean(dim=0).tolist(),
            sup_max_vio=max_vio_SL.amax(dim=0).tolist(),
            last_min_vio=min_violation(loads_SLE[-1]).tolist(),
            last_dead_experts=dead_experts(loads_SLE[-1]).tolist(),
        )
