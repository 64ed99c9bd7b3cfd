"""The numbers of an offline evaluation, as data with a versioned schema."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from moerouters.inspecting.logits_trace import About


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LayerOffline(_Part):
    """One router in one layer."""

    name: str
    avg_max_vio: float
    sup_max_vio: float
    last_max_vio: float
    kept_score: float
    changed: float


class RouterOffline(_Part):
    """One router; every number is the mean over layers, times are sums over them."""

    label: str
    name: str
    overrides: dict[str, Any]
    avg_max_vio: float
    sup_max_vio: float
    last_max_vio: float
    kept_score: float
    """Unadjusted scores of the chosen over those that topk chooses; softmax of the logits where they are the scores."""
    changed: float
    """Part of the chosen (token, expert) pairs that topk does not choose."""
    step_ms: float
    """Median time of a step: routing in train mode and update, all layers."""
    relative_time: float
    """The same over that of topk."""
    layers: tuple[LayerOffline, ...]


class OfflineReport(_Part):
    """What `moerouters replay --json` writes. A field changes its meaning only with a new `schema_version`."""

    schema_version: int = 1
    recorded: About
    tokens: int
    steps: int
    routers: tuple[RouterOffline, ...]
