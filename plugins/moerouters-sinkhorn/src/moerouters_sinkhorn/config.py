"""Settings of the sinkhorn router."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moerouters import RouterConfig


class SinkhornConfig(RouterConfig):
    """How a training forward is balanced, and what of it serves in eval. temperature=1, eval='plain' is the paper's."""

    iterations: int = Field(default=8, ge=1, le=1000, description="Row and column normalisations per forward.")
    temperature: float = Field(
        default=1.0,
        ge=1e-3,
        le=1e3,
        description=(
            "What logits are divided by before they are normalised: how much entropy the plan has. Lower ones come "
            "nearer to the best balanced assignment of one expert per token, and need more iterations."
        ),
    )
    eval: Literal["potentials", "plain"] = Field(
        default="potentials",
        description=(
            "Who chooses in eval. 'potentials': the logits less what training took off each expert, its token-weighted "
            "mean over the last step. 'plain': the logits alone, as in the paper; nothing is kept between steps."
        ),
    )
