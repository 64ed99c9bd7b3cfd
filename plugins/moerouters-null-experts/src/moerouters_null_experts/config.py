"""The settings of the router `null-experts`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from moerouters import RouterConfig


class NullExpertsConfig(RouterConfig):
    """Where null experts come from, how many slots they are to take, and what sees to it."""

    source: Literal["shared", "gate"] = Field(
        default="shared",
        description="shared: null experts score as the token's worst real expert does; for any gating. "
        "gate: the last num_null experts of the gating are null; for a model that is trained with them.",
    )
    num_null: int | None = Field(
        default=None,
        ge=1,
        description="Null experts; a token takes at least K - num_null real ones. None: K, so that it may take none; "
        "source='gate' needs a number.",
    )
    null_share: float = Field(
        default=0.25, gt=0, lt=1, description="The share of all slots that null experts are to take, on average."
    )
    rate: float = Field(
        default=0.001,
        ge=0,
        description="Step of the biases that follow null_share and balance the real experts, in units of the scores "
        "that experts are chosen by. 0 leaves that to the loss; needs source='gate'.",
    )
    alpha: float = Field(
        default=0.0,
        ge=0,
        description="Coefficient of the loss `balance`; with source='gate' the null experts share their load in it.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.source == "gate" and self.num_null is None:
            raise ValueError("source='gate' needs num_null: how many of the gating's experts are null")
        if self.source == "shared" and self.rate == 0:
            raise ValueError("source='shared' needs a rate above 0: nothing else would ever choose a null expert")
        return self
