"""The list of one rank while a builder writes it."""

from __future__ import annotations

from collections import Counter

from moerouters.pipeline.schedule import Fused, Item, Kind, Task

FORWARD, BACKWARD, INPUT, WEIGHT = Kind


class Row:
    """Items of one rank. Every new task takes the next microbatch of its stage and kind."""

    def __init__(self, num_microbatches: int) -> None:
        self.items: list[Item] = []
        self._num_microbatches = num_microbatches
        self._taken: Counter[tuple[int, Kind]] = Counter()

    def run(self, stage: int, *kinds: Kind) -> None:
        """Append the next task of each kind; nothing for a kind that has run on all microbatches."""
        self.items += self._take(stage, kinds)

    def fuse(self, *runs: tuple[int, tuple[Kind, ...]]) -> None:
        """Append one fused item of the next tasks of several stages."""
        self.items.append(Fused(tuple(task for stage, kinds in runs for task in self._take(stage, kinds))))

    def _take(self, stage: int, kinds: tuple[Kind, ...]) -> list[Task]:
        tasks = []
        for kind in kinds:
            microbatch = self._taken[stage, kind]
            if microbatch < self._num_microbatches:
                self._taken[stage, kind] += 1
                tasks.append(Task(stage, kind, microbatch))
        return tasks
