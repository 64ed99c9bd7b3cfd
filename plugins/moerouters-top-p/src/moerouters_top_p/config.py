"""The settings of the router `top-p`."""

from __future__ import annotations

from pydantic import Field

from moerouters import RouterConfig


class TopPConfig(RouterConfig):
    """How much probability a token's experts hold, and two losses. The defaults are those of arXiv:2403.07652."""

    p: float = Field(
        default=0.4,
        gt=0,
        le=1,
        description="A token gets the fewest experts, by falling score, whose probability sums to p.",
    )
    max_experts: int | None = Field(
        default=None,
        ge=1,
        description="At most this many experts per token, and as many slots; none: E, as in the paper. A bound on work "
        "and memory while the gate knows little yet: of equal probabilities p takes p * E.",
    )
    alpha: float = Field(
        default=0.01,
        ge=0,
        description="Coefficient of the load-balance loss, which is 1 at balance; 0 leaves it out.",
    )
    beta: float = Field(
        default=1e-4,
        ge=0,
        description="Coefficient of the dynamic loss, the mean entropy of a token's probabilities, without which "
        "the gate grows flat and tokens take more and more experts; 0 leaves it out.",
    )
