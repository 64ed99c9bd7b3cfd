"""Which values a model's stages take and give: the way of data between them, microbatch by microbatch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from moerouters.errors import ScheduleError

INPUT, OUTPUT = "input", "output"
"""What the first stage of a chain takes, and the last one gives."""


@dataclass(frozen=True, kw_only=True)
class Signature:
    """What a stage is called with, and what it returns, by name and in order."""

    takes: tuple[str, ...]
    gives: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class StageGraph:
    """The stages of a model in order. A value is given by one stage and taken by any number of later ones.

    What no stage gives is part of the batch. What no stage takes is for the loss, which sees all that the last stage
    gives. Building one raises ScheduleError for a value that is given twice, to an earlier stage, or to nobody.
    """

    stages: tuple[Signature, ...]

    @classmethod
    def chain(cls, num_stages: int) -> StageGraph:
        """Every stage takes what the one before gives; the first one takes `input`, the last one gives `output`."""
        names = [INPUT, *(f"hidden{stage}" for stage in range(num_stages - 1)), OUTPUT]
        return cls(stages=tuple(Signature(takes=(a,), gives=(b,)) for a, b in itertools.pairwise(names)))

    @classmethod
    def of(cls, *stages: tuple[str | Sequence[str], str | Sequence[str]]) -> StageGraph:
        """From (takes, gives) of every stage: a name, or several."""
        return cls(stages=tuple(Signature(takes=_names(takes), gives=_names(gives)) for takes, gives in stages))

    def __post_init__(self) -> None:
        seen: dict[str, int] = {}
        last = len(self.stages) - 1
        for stage, signature in enumerate(self.stages):
            for name in signature.gives:
                if name in seen:
                    raise _wrong(f"'{name}' is given by stages {seen[name]} and {stage}.", "a value has one origin")
                seen[name] = stage
            if len(set(signature.takes)) < len(signature.takes):
                raise _wrong(f"stage {stage} takes a value twice.", "its names are the arguments of the stage")
        for name, origin in seen.items():
            consumers = self.consumers[name]
            if any(stage <= origin for stage in consumers):
                raise _wrong(
                    f"'{name}' goes from stage {origin} to stage {consumers[0]}.",
                    "data goes from a stage to later ones",
                )
            if not consumers and origin != last:
                raise _wrong(f"nobody takes '{name}' of stage {origin}.", "only the last stage gives to the loss")

    @cached_property
    def origins(self) -> dict[str, int]:
        """The stage that gives each value."""
        return {name: stage for stage, signature in enumerate(self.stages) for name in signature.gives}

    @cached_property
    def consumers(self) -> dict[str, tuple[int, ...]]:
        """The stages that take each value, and each part of the batch, in order."""
        names = [name for signature in self.stages for name in (*signature.takes, *signature.gives)]
        return {
            name: tuple(stage for stage, signature in enumerate(self.stages) if name in signature.takes)
            for name in names
        }

    def passed(self, stage: int) -> tuple[str, ...]:
        """The values that a stage takes from other stages."""
        return tuple(name for name in self.stages[stage].takes if name in self.origins)

    def handed_on(self, stage: int) -> tuple[str, ...]:
        """The values that a stage gives to other stages."""
        return tuple(name for name in self.stages[stage].gives if self.consumers[name])

    def batch_names(self, stage: int) -> tuple[str, ...]:
        """The parts of the batch that a stage takes."""
        return tuple(name for name in self.stages[stage].takes if name not in self.origins)


def _names(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _wrong(what: str, why: str) -> ScheduleError:
    return ScheduleError(what, where="the graph of stages", why=why, fix="mend what the stages take and give")
