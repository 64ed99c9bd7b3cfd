"""The settings of the router `ds-moe`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moerouters import RouterConfig

Inference = Literal["threshold", "top_k", "threshold_top_k", "dense"]


class DsMoeConfig(RouterConfig):
    """In training every token gets every expert; `inference` says which ones it gets in eval mode."""

    alpha: float = Field(
        default=6.3e-4,
        ge=0,
        description="Coefficient of the mutual-information loss; 0 leaves it out. The paper: 2e-4 (6B) to 6.3e-4 (1B).",
    )
    marginal: Literal["all_reduce", "local"] = Field(
        default="all_reduce",
        description="Whose tokens the loss is of: those of all ranks, summed inside forward, or of this rank alone.",
    )
    inference: Inference = Field(
        default="threshold",
        description="Active experts in eval mode: those with E * S > eps; the K best; the K best, K the mean number of "
        "experts that pass the threshold in this batch; or all.",
    )
    eps: float = Field(
        default=0.48,
        ge=0,
        description="Threshold on E * S, an expert's probability in units of an even share.",
    )
    top_k: int | None = Field(
        default=None, ge=1, description="K of inference='top_k'; null takes the gating's experts per token."
    )

    @property
    def talks(self) -> bool:
        """Whether forward sums over the ranks."""
        return self.alpha > 0 and self.marginal == "all_reduce"
