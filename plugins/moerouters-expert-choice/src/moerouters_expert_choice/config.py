"""Settings of the expert-choice router."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moerouters import RouterConfig


class ExpertChoiceConfig(RouterConfig):
    """How many tokens an expert takes in training, and how tokens find experts in eval."""

    capacity: float = Field(
        default=1.0,
        ge=0.001,
        le=1000,
        description=(
            "Experts per token on average, in units of the gating's K; taken as the nearest fraction whose denominator "
            "is at most 1000."
        ),
    )
    eval: Literal["threshold", "choice"] = Field(
        default="threshold",
        description=(
            "Who chooses in eval. 'threshold': a token goes to the experts whose learned threshold its score reaches, "
            "in every batch the same. 'choice': experts take their best tokens of the batch, as in training."
        ),
    )
    memory: float = Field(
        default=0.9,
        ge=0,
        lt=1,
        description="Share of the learned thresholds that an optimizer step keeps; the rest comes from its batches.",
    )
    most: int = Field(
        default=3,
        ge=1,
        description=(
            "Under eval='threshold' a token has at most this many times K experts, those of its highest scores; it has "
            "as many slots, filled or not."
        ),
    )
