"""The settings of the router `remoe`."""

from __future__ import annotations

from pydantic import Field

from moerouters import RouterConfig

LEAST = 1e-12
"""The coefficient falls no further: at 0 no factor would ever raise it again. From here to 1e-3 takes 114 steps of
1.2."""
MOST = 1e4
"""It rises no further: where the gate does not answer, frozen for one, it would overflow in 600 steps, and inf * 0 is
NaN."""


class RemoeConfig(RouterConfig):
    """How the L1 coefficient starts and moves. The defaults are those of arXiv:2412.14711."""

    initial: float = Field(
        default=1e-8,
        ge=LEAST,
        le=MOST,
        description="The L1 coefficient of the first step. Small, so that training begins with about half of all "
        "experts at every token (the dense stage of the paper) and grows sparse from there.",
    )
    factor: float = Field(
        default=1.2,
        gt=1,
        le=10,
        description="The coefficient is multiplied by this after a step with more than K experts per token on average, "
        "and divided by it after one with fewer.",
    )
