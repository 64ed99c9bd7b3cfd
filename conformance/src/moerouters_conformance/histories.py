"""Histories: seeded sequences of logit batches whose experts are not equally popular, for rules about balance.

Every batch is noise, normal and independent for each token and expert, plus one popularity per expert. What becomes of
the popularity over the steps is the kind of the history. Times scale with `adapt`, the number of updates that the
router says it needs (`Capabilities.balance.after_steps`): a bound is a promise about how well *and* how fast.

* stationary: the popularity stays as it is.
* drifting: it wanders over the experts, one full round in 12 * adapt steps.
* switching: every `adapt` + WATCHED steps it is turned round, the favourites become the outcasts: the worst that an
  opponent can do to a router that remembers.
* collapsing: it grows from nothing to half as much again, as where nothing holds a gate back from its own choices.

A declared bound is held to on every batch that comes at least `after_steps` updates after the start or a sudden change.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

import torch
from torch import Tensor

WATCHED = 30
"""Batches that are looked at once the router had the time that it asks for."""
LEAST_ADAPT = 20
"""A router that needs no time is still shown a world that does not turn over in a step."""


class Kind(StrEnum):
    """What becomes of the popularity of experts."""

    STATIONARY = "stationary"
    DRIFTING = "drifting"
    SWITCHING = "switching"
    COLLAPSING = "collapsing"


@dataclass(frozen=True, kw_only=True)
class History:
    """One sequence of batches; the same numbers for the same fields."""

    kind: Kind
    num_experts: int = 8
    tokens: int = 256
    seed: int = 0
    after_steps: int = 0
    """The updates that the router asks for."""
    strength: float = 1.0
    """Popularities run from +strength to -strength, in units of the noise."""

    @property
    def adapt(self) -> int:
        return max(self.after_steps, LEAST_ADAPT)

    @property
    def steps(self) -> int:
        """Batches in all."""
        rounds = {Kind.SWITCHING: 3, Kind.DRIFTING: 3, Kind.COLLAPSING: 2}.get(self.kind, 1)
        return rounds * (self.adapt + WATCHED)

    def __iter__(self) -> Iterator[tuple[Tensor, bool]]:
        """Per step the float32 [T, E] logits, and whether a declared bound has to hold there."""
        generator = torch.Generator().manual_seed(self.seed)
        for step in range(self.steps):
            noise_TE = torch.randn(self.tokens, self.num_experts, generator=generator)
            yield noise_TE + self.popularity_E(step), self._since_change(step) >= self.after_steps

    def popularity_E(self, step: int) -> Tensor:
        """[E], what every token's logits of this step have in common."""
        start_E = self._start_E
        match self.kind:
            case Kind.STATIONARY:
                return start_E
            case Kind.SWITCHING:
                return -start_E if step // (self.adapt + WATCHED) % 2 else start_E
            case Kind.COLLAPSING:
                return start_E * (1.5 * step / self.steps)
        phases_E = (self._order_E / self.num_experts + step / (12 * self.adapt)) * 2 * math.pi
        return self.strength * phases_E.sin()

    def _since_change(self, step: int) -> int:
        return step % (self.adapt + WATCHED) if self.kind is Kind.SWITCHING else step

    @cached_property
    def _order_E(self) -> Tensor:
        """The experts in an order that the seed draws: no rule may depend on which ids are popular."""
        return torch.randperm(self.num_experts, generator=torch.Generator().manual_seed(1000 + self.seed))

    @cached_property
    def _start_E(self) -> Tensor:
        return torch.linspace(self.strength, -self.strength, self.num_experts)[self._order_E]
