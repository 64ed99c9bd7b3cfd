"""Routers as benchmarks run them: with what their method prescribes, and all that they may ask for."""

from __future__ import annotations

import torch

from moerouters.bench.shapes import Shape
from moerouters.bench.weights import normal
from moerouters.gating import Gating
from moerouters.registry import build, info
from moerouters.router import Router
from moerouters.types import RouteContext

_WIDTH = 8
"""Of hidden states where only a router is timed."""


def router_of(name: str, shape: Shape) -> Router:
    """The installed router of that name with its defaults, under softmax and top-k or the gating of its method.

    Raises MoeroutersError.
    """
    return build(name, Gating.of(shape.E, shape.K, **info(name).spec.gating))


def context(shape: Shape, *, device: torch.device, width: int = _WIDTH) -> RouteContext:
    """Token ids, hidden states and a noise key, the same each time."""
    return RouteContext(
        token_ids_T=torch.arange(shape.T, device=device) % 1024,
        hidden_TD=normal(shape.T, width, device=device),
        noise_key=torch.zeros(4, dtype=torch.int64, device=device),
    )
