"""Settings of the base-layers router."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moerouters import RouterConfig


class BaseLayersConfig(RouterConfig):
    """How near the assignment of a training forward comes to the best one; it is balanced in any case."""

    rounds: int = Field(
        default=16,
        ge=0,
        le=1000,
        description="Auction rounds per training forward. 0: experts are filled by the prices of the dual alone.",
    )
    objective: Literal["logits", "scores"] = Field(
        default="logits",
        description=(
            "What the assignment has the largest sum of: 'logits', as in the paper, or the gating's 'scores', which "
            "weights are made of. Where the gating has a correction bias, always the biased scores."
        ),
    )
