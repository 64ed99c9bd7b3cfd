"""A pipeline schedule as a table: what every rank runs, in which order. All else in this room makes or reads one.

Words: P ranks, S stages (consecutive parts of the model), M microbatches. With S > P a rank holds several stages, which
are then called chunks. A table says nothing about time: each rank runs its list from first to last, and waits wherever
what a task needs is not there yet.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from moerouters.errors import ScheduleError


class Kind(StrEnum):
    """What a task computes. A backward is either one task, or two: only the first half is waited for by other ranks."""

    FORWARD = "forward"
    BACKWARD = "backward"
    INPUT_BACKWARD = "input-backward"
    WEIGHT_BACKWARD = "weight-backward"

    @property
    def letter(self) -> str:
        """F, B, I or W, as torch.distributed.pipelining writes them."""
        return self.name[0]


KIND_OF_LETTER = {kind.letter: kind for kind in Kind}
_TASK = re.compile(r"(\d{1,9})([FBIW])(\d{1,9})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Task:
    """One stage's work on one microbatch. Its text is torch's: `2F0` is the forward of microbatch 0 in stage 2."""

    stage: int
    kind: Kind
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind.letter}{self.microbatch}"

    @classmethod
    def parse(cls, text: str, *, where: str = "") -> Task:
        """The reverse of str. Raises ScheduleError, which says `where` the text stands."""
        found = _TASK.fullmatch(text.strip())
        if found is None:
            raise ScheduleError(
                f"{text!r} is no task.",
                where=where,
                why="a task is written stage, kind, microbatch; kinds are " + ", ".join(KIND_OF_LETTER),
                fix="2F0 is the forward of microbatch 0 in stage 2",
            )
        stage, letter, microbatch = found.groups()
        return cls(int(stage), KIND_OF_LETTER[letter], int(microbatch))


@dataclass(frozen=True, slots=True)
class Fused:
    """Two or more tasks that a rank starts as one: it waits for all they need, and may overlap forward and backward."""

    tasks: tuple[Task, ...]

    def __str__(self) -> str:
        return f"({';'.join(map(str, self.tasks))})"


Item = Task | Fused


def tasks_of(item: Item) -> tuple[Task, ...]:
    """The tasks of an item, in the order in which they run when they do not overlap."""
    return item.tasks if isinstance(item, Fused) else (item,)


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """Where a task stands: its item's number in the list of its rank, and its number inside that item."""

    rank: int
    position: int
    index: int = 0

    def __str__(self) -> str:
        return f"rank {self.rank}, position {self.position}"


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The table. Building one checks nothing; `moerouters.pipeline.check` says whether it can run."""

    name: str
    num_microbatches: int
    placement: tuple[int, ...]
    """The rank of every stage."""
    ranks: tuple[tuple[Item, ...], ...]
    """What every rank runs, in order."""

    @property
    def num_ranks(self) -> int:
        """P."""
        return len(self.ranks)

    @property
    def num_stages(self) -> int:
        """S."""
        return len(self.placement)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages that lie on a rank, in the model's order."""
        return tuple(stage for stage, owner in enumerate(self.placement) if owner == rank)

    def tasks(self) -> Iterator[tuple[Place, Task]]:
        """All tasks with their places, rank after rank, fused ones unpacked."""
        for rank, items in enumerate(self.ranks):
            for position, item in enumerate(items):
                for index, task in enumerate(tasks_of(item)):
                    yield Place(rank, position, index), task

    @cached_property
    def places(self) -> dict[Task, Place]:
        """Where each task stands; the last place of one that stands twice."""
        return {task: place for place, task in self.tasks()}

    def live(self, rank: int, *, overlap: bool = False) -> Iterator[tuple[Place, Task, int]]:
        """The tasks of a rank, each with the activations that the rank holds while it runs.

        An activation lives from its forward through its backward, or through the weight half of a split one, and counts
        1 whatever the size of its stage. With `overlap` the forward of a fused item lives as long as the item.
        """
        live = 0
        for position, item in enumerate(self.ranks[rank]):
            tasks = list(enumerate(tasks_of(item)))
            if overlap:
                tasks.sort(key=lambda entry: entry[1].kind is not Kind.FORWARD)
            for index, task in tasks:
                live += task.kind is Kind.FORWARD
                yield Place(rank, position, index), task, live
                live -= task.kind in (Kind.BACKWARD, Kind.WEIGHT_BACKWARD)

    def gradient_of(self, stage: int, microbatch: int) -> Task:
        """The task after which a stage can hand a gradient to the stage before: the input half of a split backward."""
        half = Task(stage, Kind.INPUT_BACKWARD, microbatch)
        return half if half in self.places else Task(stage, Kind.BACKWARD, microbatch)

    def needs(self, task: Task) -> tuple[Task, ...]:
        """What has to be done before `task`; those of other ranks are what is sent between ranks."""
        stage, microbatch = task.stage, task.microbatch
        if task.kind is Kind.FORWARD:
            return (Task(stage - 1, Kind.FORWARD, microbatch),) if stage > 0 else ()
        if task.kind is Kind.WEIGHT_BACKWARD:
            return (Task(stage, Kind.INPUT_BACKWARD, microbatch),)
        own = Task(stage, Kind.FORWARD, microbatch)
        return (own,) if stage == self.num_stages - 1 else (own, self.gradient_of(stage + 1, microbatch))


def plain_placement(num_ranks: int) -> tuple[int, ...]:
    """One stage a rank."""
    return tuple(range(num_ranks))


def interleaved_placement(num_ranks: int, num_chunks: int) -> tuple[int, ...]:
    """Stage s on rank s % P, Megatron's way."""
    return tuple(range(num_ranks)) * num_chunks


def v_placement(num_ranks: int) -> tuple[int, ...]:
    """Two stages a rank: down the ranks and back up, so that rank 0 holds the first and the last."""
    return (*range(num_ranks), *reversed(range(num_ranks)))
