"""Schedules in files: a CSV of ours, one task a row, and PyTorch's, one rank a row. Reading recognises which.

Ours has the header `rank,position,stage,microbatch,kind` and a row for each task. Tasks of one rank run by rising
position; tasks of the same position are fused, in the order of their rows. A kind is `forward`, `backward`,
`input-backward` or `weight-backward`. Sizes and placement follow from the rows. PyTorch's is told in `torch_csv`.
"""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from moerouters.errors import ConfigError, ScheduleError
from moerouters.pipeline.check import check
from moerouters.pipeline.schedule import Fused, Kind, Schedule, Task
from moerouters.pipeline.table import from_table
from moerouters.pipeline.torch_csv import check_transfers, dump_torch, parse_torch

HEADER = ("rank", "position", "stage", "microbatch", "kind")


def dump_rows(schedule: Schedule) -> str:
    """The text of our CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADER)
    for place, task in schedule.tasks():
        writer.writerow((place.rank, place.position, task.stage, task.microbatch, task.kind))
    return text.getvalue()


def parse_rows(text: str, *, name: str) -> Schedule:
    """Read our CSV. Raises ScheduleError for a line that is no task, and for a rank without any."""
    items: defaultdict[int, defaultdict[int, list[Task]]] = defaultdict(lambda: defaultdict(list))
    lines = csv.reader(io.StringIO(text))
    next(lines)
    for number, cells in enumerate(lines, start=2):
        if not cells:
            continue
        rank, position, task = _row(cells, number)
        items[rank][position].append(task)
    table = []
    for rank in range(len(items)):
        if rank not in items:
            raise ScheduleError(
                f"rank {rank} has no task.",
                where=f"schedule '{name}'",
                why=f"there are tasks of rank {max(items)}",
                fix="number ranks from 0 without a gap",
            )
        groups = (items[rank][position] for position in sorted(items[rank]))
        table.append([Fused(tuple(group)) if len(group) > 1 else group[0] for group in groups])
    return from_table(table, name=name)


FORMATS: Mapping[str, Callable[[Schedule], str]] = MappingProxyType({"moerouters": dump_rows, "torch": dump_torch})
"""How a schedule is written, by format."""


def read(path: Path) -> Schedule:
    """The schedule in a file of either format, unchecked; it is named after the file.

    Raises ConfigError if the file cannot be read, ScheduleError if something in it is no task.
    """
    text = _text(path)
    return parse_rows(text, name=path.stem) if _is_ours(text) else parse_torch(text, name=path.stem).schedule


def check_file(path: Path, *, max_live: int | None = None) -> Schedule:
    """As `read`, and `check` it, with the sends and receives that a file of PyTorch's may hold."""
    text = _text(path)
    if _is_ours(text):
        schedule = parse_rows(text, name=path.stem)
        check(schedule, max_live=max_live)
    else:
        table = parse_torch(text, name=path.stem)
        schedule = table.schedule
        check(schedule, max_live=max_live)
        check_transfers(table)
    return schedule


def write(schedule: Schedule, path: Path, *, format: str = "moerouters") -> None:
    """Write a schedule. format: `moerouters` or `torch`."""
    if format not in FORMATS:
        raise ConfigError(f"there is no format '{format}'.", why=f"there is: {', '.join(FORMATS)}", fix="pick one")
    path.write_text(FORMATS[format](schedule), encoding="utf-8")


def _is_ours(text: str) -> bool:
    return text.lstrip().startswith(",".join(HEADER))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # spreadsheets put a mark in front
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read '{path}'.", why=str(error), fix="pass a CSV file of a schedule") from error


def _row(cells: list[str], number: int) -> tuple[int, int, Task]:
    try:
        rank, position, stage, microbatch = map(int, cells[:4])
        (kind,) = cells[4:]
        if min(rank, position, stage, microbatch) < 0:
            raise ValueError("a number is below 0")
        return rank, position, Task(stage, Kind(kind.strip()), microbatch)
    except ValueError as error:
        raise ScheduleError(
            f"{','.join(cells)!r} is no task.",
            where=f"line {number}",
            why=f"{error}; a row is {','.join(HEADER)}",
            fix=f"write for instance 0,0,0,0,{Kind.FORWARD}; kinds are {', '.join(Kind)}",
        ) from error
