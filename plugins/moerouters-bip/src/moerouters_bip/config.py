"""Settings of the bip router."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moerouters import RouterConfig


class BipConfig(RouterConfig):
    """How the dual is solved in each training forward."""

    iterations: int = Field(default=4, ge=1, le=1000, description="Dual iterations per forward, T in the paper.")
    variant: Literal["centred", "published"] = Field(
        default="centred",
        description=(
            "'centred': thresholds halfway between neighbouring order statistics, no clipping, mean of q kept at 0. "
            "'published': thresholds on the order statistics, clipped at 0, as in the paper; drifts on softmax scores."
        ),
    )
    scope: Literal["local", "exact", "histogram"] = Field(
        default="local",
        description=(
            "Whose tokens are balanced. 'local': each rank its own. 'exact': those of all ranks of the token group, as "
            "one process would. 'histogram': the same from binned values, with a fifth of the collectives."
        ),
    )

    @property
    def talks(self) -> bool:
        """Whether forward counts over ranks."""
        return self.scope != "local"
