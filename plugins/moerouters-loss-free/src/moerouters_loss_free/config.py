"""The settings of the router `loss-free`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moerouters import RouterConfig

Rule = Literal["sign", "error", "multiplicative"]


class LossFreeConfig(RouterConfig):
    """How the bias follows the load. The defaults are Algorithm 1 of arXiv:2408.15664 for sigmoid scores."""

    rule: Rule = Field(
        default="sign",
        description="sign: b += u * sign(mean - load). error: b += u * (mean - load) / mean, for softmax gating. "
        "multiplicative: scores are multiplied by b, which starts at 1 and moves by the sign rule.",
    )
    rate: float = Field(
        default=0.001,
        gt=0,
        description="u, the step of the bias per optimizer step, in units of the scores that experts are chosen by.",
    )
    centre: bool = Field(
        default=False,
        description="Subtract the mean over experts from every step of the bias, so that the biases never drift "
        "together (torchtitan; not in the paper).",
    )
