"""Tables as users write them: lists of tasks or of their texts, or a function that makes them for given sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from moerouters.errors import ScheduleError
from moerouters.pipeline.schedule import Fused, Item, Kind, Place, Schedule, Task, tasks_of

Table = Sequence[Iterable[object]]
"""One list a rank, of Task, Fused or their texts; None and empty texts are idle steps, which are dropped."""


def from_table(
    table: Table,
    *,
    name: str = "schedule",
    placement: Sequence[int] | None = None,
    num_microbatches: int | None = None,
) -> Schedule:
    """The schedule of a table, unchecked.

    What is not given is read off the table: a stage lies where its first task stands. Raises ScheduleError for anything
    else in the table, and for a stage without tasks.
    """
    ranks = tuple(tuple(_items(row, rank)) for rank, row in enumerate(table))
    tasks = [(rank, task) for rank, items in enumerate(ranks) for item in items for task in tasks_of(item)]
    if placement is None:
        placement = _placement(tasks)
    if num_microbatches is None:
        num_microbatches = 1 + max((task.microbatch for _, task in tasks), default=-1)
    return Schedule(name=name, num_microbatches=num_microbatches, placement=tuple(placement), ranks=ranks)


def from_function(
    function: Callable[[int, int], Table], num_ranks: int, num_microbatches: int, *, name: str | None = None
) -> Schedule:
    """The schedule that function(num_ranks, num_microbatches) gives as a table, unchecked and named after it."""
    called = name or str(getattr(function, "__name__", "schedule"))
    table = function(num_ranks, num_microbatches)
    if len(table) != num_ranks:
        raise ScheduleError(
            f"{called} gave a table of {len(table)} ranks.",
            why=f"it was asked for {num_ranks} ranks and {num_microbatches} microbatches",
            fix="return one list of tasks for each rank",
        )
    return from_table(table, name=called, num_microbatches=num_microbatches)


def parse_item(text: str, *, where: str = "") -> Item | None:
    """An item from `2F0` or `(2F1;3B0)`, with or without torch's OVERLAP_F_B after it; None from an empty text."""
    text = text.strip()
    if not text.startswith("("):
        return Task.parse(text, where=where) if text else None
    inside, bracket, after = text[1:].partition(")")
    tasks = tuple(Task.parse(part, where=where) for part in inside.split(";"))
    if not bracket or after not in ("", "OVERLAP_F_B") or len(tasks) < 2:
        raise ScheduleError(
            f"{text!r} is no fused item.",
            where=where,
            why="it is two or more tasks in brackets",
            fix="write for instance (2F1;3B0)",
        )
    return Fused(tasks)


def _items(row: Iterable[object], rank: int) -> Iterator[Item]:
    for position, cell in enumerate(row):
        where = str(Place(rank, position))
        item = parse_item(cell, where=where) if isinstance(cell, str) else cell
        if item is None:
            continue
        if not isinstance(item, Task | Fused) or not tasks_of(item) or not all(map(_is_task, tasks_of(item))):
            raise ScheduleError(
                f"the table holds {cell!r}.",
                where=where,
                why="a cell is a Task of a stage and a microbatch >= 0, a Fused of such tasks, their text, or None",
                fix="write for instance '2F0', or Task(2, Kind.FORWARD, 0)",
            )
        yield item


def _is_task(task: object) -> bool:
    if not isinstance(task, Task):
        return False
    kind: object = task.kind  # a user may have put in anything
    numbers: tuple[object, ...] = (task.stage, task.microbatch)
    return isinstance(kind, Kind) and all(isinstance(number, int) and number >= 0 for number in numbers)


def _placement(tasks: Sequence[tuple[int, Task]]) -> tuple[int, ...]:
    found: dict[int, int] = {}
    for rank, task in tasks:
        found.setdefault(task.stage, rank)
    for expected, stage in enumerate(sorted(found)):
        if stage != expected:
            raise ScheduleError(
                f"task {expected}F0 is missing: no rank has a task of stage {expected}.",
                why=f"the table has tasks of stage {stage}",
                fix="number stages from 0 without a gap, from the model's input to its loss",
            )
    return tuple(found[stage] for stage in range(len(found)))
