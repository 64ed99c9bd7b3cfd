"""Settings of the routers `bip` and `quantile`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from moerouters import RouterConfig

ITERATIONS, MEMORY = 4, 128


class DualConfig(RouterConfig):
    """What both share: how the state follows what an optimizer step found."""

    ema: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of the old q that a step keeps: q becomes ema * q + (1 - ema) * the q that was found.",
    )


class BipConfig(DualConfig):
    """How the dual is solved in each training forward."""

    form: Literal["batch", "online"] = Field(
        default="batch",
        description=(
            "'batch': solved for all tokens, then they are routed. 'online': q moves with every token, which is causal "
            "and slow."
        ),
    )
    iterations: int = Field(
        default=ITERATIONS, ge=1, le=1000, description="Dual iterations per forward, T in the paper; form 'batch'."
    )
    variant: Literal["centred", "published"] = Field(
        default="centred",
        description=(
            "'centred': thresholds halfway between neighbouring order statistics, no clipping, mean of q kept at 0, "
            "steps that go further near balance. 'published': thresholds on the order statistics, clipped at 0, as in "
            "the paper; drifts on softmax scores."
        ),
    )
    scope: Literal["local", "exact", "histogram"] = Field(
        default="local",
        description=(
            "Whose tokens are balanced. 'local': each rank its own. 'exact': those of all ranks of the token group, as "
            "one process would. 'histogram': the same from binned values, with a fifth of the collectives."
        ),
    )
    memory: int = Field(
        default=MEMORY, ge=0, description="As how many tokens of the batch the q kept weighs; form 'online'."
    )

    @model_validator(mode="after")
    def _of_one_form(self) -> Self:
        if self.form == "online" and (self.iterations, self.scope) != (ITERATIONS, "local"):
            raise ValueError("form 'online' takes one step per token of this rank: leave iterations and scope out")
        if self.form == "batch" and self.memory != MEMORY:
            raise ValueError("form 'batch' starts from the q kept, whatever its weight: leave memory out")
        return self

    @property
    def talks(self) -> bool:
        """Whether forward counts over ranks."""
        return self.scope != "local"


class QuantileConfig(DualConfig):
    """How one dual step per optimizer step finds its order statistics."""

    estimator: Literal["histogram", "exact"] = Field(
        default="histogram",
        description=(
            "'histogram': of the tokens of all micro-batches and ranks together, each value up to an eighth of its "
            "distance to the old q. 'exact': exactly, but of each forward alone; the step takes the mean."
        ),
    )
