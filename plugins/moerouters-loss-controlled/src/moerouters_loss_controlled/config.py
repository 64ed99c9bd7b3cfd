"""The settings of the router `loss-controlled`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moerouters import RouterConfig


class LossControlledConfig(RouterConfig):
    """Coefficients of the losses, several at once; 0 leaves a loss out.

    All of them may be 0: that is the control of a sweep over a coefficient, and routes like `topk`.
    """

    alpha: float = Field(
        default=0.01,
        ge=0,
        description="Coefficient of the loss over a micro-batch, `switch`: alpha * sum_i f_i P_i, alpha when balanced.",
    )
    form: Literal["switch", "gshard"] = Field(
        default="switch",
        description="Which choices f counts, in every loss: all K of a token (switch) or only its first (gshard).",
    )
    sequence_alpha: float = Field(
        default=0.0,
        ge=0,
        description="Coefficient of the loss per sequence, `sequence`: the mean over sequences of sum_i f_i P_i.",
    )
    global_alpha: float = Field(
        default=0.0,
        ge=0,
        description="Coefficient of the loss over the global batch, `global`: f from all micro-batches and ranks.",
    )
    global_load: Literal["last_step", "all_reduce"] = Field(
        default="last_step",
        description="Where the f of `global` comes from: the whole load of the last optimizer step, or the load of "
        "this micro-batch summed over the ranks inside forward.",
    )
    z_alpha: float = Field(
        default=0.0,
        ge=0,
        description="Coefficient of the z-loss, `z`: the mean of logsumexp(logits) ** 2.",
    )

    @property
    def balances(self) -> bool:
        """Whether any loss looks at the load."""
        return bool(self.alpha or self.sequence_alpha or self.global_alpha)

    @property
    def remembers(self) -> bool:
        """Whether the router keeps the load of the last step."""
        return self.global_alpha > 0 and self.global_load == "last_step"

    @property
    def talks(self) -> bool:
        """Whether forward sums the load over the ranks."""
        return self.global_alpha > 0 and self.global_load == "all_reduce"
