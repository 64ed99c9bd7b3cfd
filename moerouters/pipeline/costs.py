"""What tasks and transfers cost in a simulation. Integers and fractions stay exact; units are the caller's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from types import MappingProxyType

from moerouters.errors import ConfigError
from moerouters.pipeline.schedule import Kind

Number = int | float | Fraction


def _at_least_0(cost: Number, what: str) -> None:
    if not 0 <= cost < math.inf:
        raise ConfigError(f"{what} takes {cost}.", why="a time is a finite number >= 0", fix="mend the costs")


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCost:
    """The time of each kind of task in one stage, the same for every microbatch.

    Without halves (None) the stage cannot split its backward; without `backward` a whole one takes both halves' time.
    """

    forward: Number = 1
    input_backward: Number | None = 1
    weight_backward: Number | None = 1
    backward: Number | None = None

    def __post_init__(self) -> None:
        for kind in Kind:
            cost = self._cost(kind)
            if cost is not None:
                _at_least_0(cost, f"a {kind}")

    def of(self, kind: Kind) -> Number:
        """Raises ConfigError for a half of a backward that cannot be split."""
        cost = self._cost(kind)
        if cost is None:
            raise ConfigError(
                f"the costs of a stage have no {kind}.",
                why="the schedule needs it",
                fix="give the costs of both halves: forward, input-backward, weight-backward",
            )
        return cost

    def _cost(self, kind: Kind) -> Number | None:
        match kind:
            case Kind.FORWARD:
                return self.forward
            case Kind.INPUT_BACKWARD:
                return self.input_backward
            case Kind.WEIGHT_BACKWARD:
                return self.weight_backward
        if self.backward is None and self.input_backward is not None and self.weight_backward is not None:
            return self.input_backward + self.weight_backward
        return self.backward


UNIT = StageCost()
"""Forward and both halves of a backward take 1 each, a whole backward 2."""

Costs = StageCost | Sequence[StageCost]
"""One for all stages, or one for each."""


def cost_of_stages(costs: Costs, num_stages: int) -> tuple[StageCost, ...]:
    """One StageCost for each stage. Raises ConfigError if there are more or fewer."""
    if isinstance(costs, StageCost):
        return (costs,) * num_stages
    if len(costs) != num_stages:
        raise ConfigError(
            f"there are costs of {len(costs)} stages.",
            why=f"the schedule has {num_stages} stages",
            fix="give one cost for all stages, or one for each",
        )
    return tuple(costs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One direction between two ranks: a transfer takes latency + size / bandwidth."""

    latency: Number = 0
    bandwidth: Number | None = None
    """None: without a limit."""

    def __post_init__(self) -> None:
        _at_least_0(self.latency, "a transfer")
        if self.bandwidth is not None and not self.bandwidth > 0:
            raise ConfigError(f"a bandwidth is {self.bandwidth}.", why="it is > 0", fix="leave it out for no limit")

    def time(self, size: Number) -> Number:
        """Of a transfer of `size`, exact for integers and fractions."""
        if self.bandwidth is None:
            return self.latency
        if isinstance(size, int) and isinstance(self.bandwidth, int):
            return self.latency + Fraction(size, self.bandwidth)
        return self.latency + size / self.bandwidth


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """What it costs to bring an activation or a gradient from one rank to another.

    Transfers run beside computation and beside each other. Between stages of one rank they are free.
    """

    link: Link = Link()
    """Between any two ranks that `links` does not name."""
    links: Mapping[tuple[int, int], Link] = field(default_factory=lambda: MappingProxyType({}))
    """By (sending rank, receiving rank)."""
    size: Number = 1
    """Of what is sent for one microbatch, in the unit of bandwidth times time."""

    def __post_init__(self) -> None:
        if not 0 <= self.size < math.inf:
            raise ConfigError(f"a transfer has size {self.size}.", why="a size is a finite number >= 0", fix="mend it")

    def check(self, num_ranks: int) -> None:
        """Raise ConfigError for a link of a rank that is not there: it would count for nothing."""
        for pair in self.links:
            if not all(0 <= rank < num_ranks for rank in pair):
                raise ConfigError(
                    f"there is a link from rank {pair[0]} to rank {pair[1]}.",
                    why=f"the schedule has {num_ranks} ranks, from 0",
                    fix="take the link out, or mend its ranks",
                )

    def time(self, source: int, target: int) -> Number:
        """Of one transfer."""
        return 0 if source == target else self.links.get((source, target), self.link).time(self.size)


FREE = Network()
