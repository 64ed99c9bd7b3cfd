"""The settings of the router `noisy-topk`."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from moerouters import RouterConfig


class NoisyTopkConfig(RouterConfig):
    """Where noise gets its size from, and two coefficients. With `hidden_size` it is the method of arXiv:1701.06538."""

    hidden_size: int | None = Field(
        default=None,
        ge=1,
        description="Width of the layer's hidden states: the standard deviation of the noise is learned, "
        "softplus(W_noise x) per token and expert. None: it is `std` for all, and the router has no parameters.",
    )
    std: float = Field(
        default=1.0,
        gt=0,
        description="Standard deviation of the noise on the logits where none is learned.",
    )
    importance: float = Field(
        default=0.1,
        ge=0,
        description="w_importance, coefficient of the squared coefficient of variation of the experts' summed weights; "
        "0 leaves it out.",
    )
    load: float = Field(
        default=0.1,
        ge=0,
        description="w_load, coefficient of the squared coefficient of variation of the experts' expected loads; 0 "
        "leaves it out.",
    )

    @field_validator("hidden_size", mode="before")
    @classmethod
    def _no_flag(cls, value: Any) -> Any:
        if isinstance(value, bool):  # which pydantic would take for the width 1
            raise ValueError("input should be a width or None")
        return value
