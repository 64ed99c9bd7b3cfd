"""What was asked and what was found, as data with a versioned schema."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from moerouters.gating import Gating


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Experiment(_Part):
    """The layer, and how much is drawn."""

    num_experts: int = Field(default=16, ge=1)
    """E."""
    top_k: int = Field(default=2, ge=1)
    """K."""
    score: Literal["softmax", "sigmoid", "sqrtsoftplus", "relu"] = "softmax"
    """Of the gating."""
    tokens: int = Field(default=256, ge=2)
    """T, of one forward: a router that solves over a batch leaks by the size of that batch."""
    samples: int = Field(default=64, ge=2)
    """Futures per past and position; more than log2(samples) bits cannot be seen."""
    positions: int = Field(default=8, ge=1)
    """Tokens whose experts are looked at, each in the middle of its part of the sequence."""
    repeats: int = Field(default=8, ge=2)
    """Pasts; the interval is over them."""
    updates: int = Field(default=32, ge=0)
    """What the router learns from before, batches of the same kind."""
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k {self.top_k} exceeds experts {self.num_experts}")
        if self.positions >= self.tokens:
            raise ValueError(f"{self.positions} positions need more than {self.tokens} tokens")
        return self

    @property
    def at(self) -> tuple[int, ...]:
        """The positions: never the last token, after which nothing comes."""
        return tuple((2 * i + 1) * (self.tokens - 1) // (2 * self.positions) for i in range(self.positions))

    def gating(self, prescribed: Mapping[str, Any] = MappingProxyType({})) -> Gating:
        """A fresh one; `prescribed` goes before these settings (`RouterSpec.gating`)."""
        return Gating.of(self.num_experts, self.top_k, **({"score": self.score} | dict(prescribed)))


class PositionLeak(_Part):
    """The mean over pasts for one token."""

    position: int
    bits: float


class RouterLeak(_Part):
    """One router in one layer."""

    label: str
    causal: bool
    """As it declares."""
    bits: float
    """Per token: the mean over positions and pasts."""
    low: float
    high: float
    """The 95% interval of that mean, by bootstrap over pasts."""
    distinct: int
    """Most different choices that were seen for one token and one past."""
    positions: tuple[PositionLeak, ...]
    expert_choice_bits: float | None
    """K log2((1 - K/E) / (K/E)), the figure of arXiv:2408.15664; for routers that hand out pairs and are not causal."""


class LeakReport(_Part):
    """What `moerouters leak --json` writes. A field changes its meaning only with a new `schema_version`."""

    schema_version: int = 1
    experiment: Experiment
    torch: str
    """Version: other versions may round otherwise, and a solver's last bits decide."""
    routers: tuple[RouterLeak, ...]
