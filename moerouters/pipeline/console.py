"""A schedule as a Gantt chart in a terminal: a line a rank, colours for kinds, numbers for microbatches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.text import Text

from moerouters.pipeline.costs import Number
from moerouters.pipeline.look import COLOURS, colour, kinds_of, overlaps
from moerouters.pipeline.schedule import Kind, Schedule
from moerouters.pipeline.simulate import Simulation, TimedTask

_BANDS, _PLAIN_BANDS = 6, 24
"""Bands that a chart is cut into, at most; one that needs more is squeezed. Without colours the kind needs a column
too, and what goes to a file may be long."""
_TICK = 8
"""Columns between the times in the ruler, at least."""


def print_gantt(console: Console, simulation: Simulation) -> None:
    """Print the chart, cut into bands as wide as the terminal, and its legend. Idle time is dots without colours."""
    coloured = console.color_system is not None
    lanes = list(_lanes(simulation))
    margin = max(len(label) for label, _ in lanes) + 1
    room = max(20, console.width - margin)
    scale, wide = _scale(simulation, room, coloured=coloured)
    room -= room % wide  # so that bands end between tasks
    total = max(1, _column(simulation.makespan, scale))
    rows = [(label, _row(simulation.schedule, tasks, scale, total, coloured=coloured)) for label, tasks in lanes]
    for start in range(0, total, room):
        end = min(start + room, total)
        console.print(Text(" " * margin + _ruler(scale, total)[start:end], style="dim"), soft_wrap=True)
        for label, row in rows:
            console.print(Text(f"{label:<{margin}}") + row[start:end], soft_wrap=True)
    console.print(_legend(simulation.schedule, coloured=coloured))


def summary(simulation: Simulation) -> str:
    """Sizes and numbers of a schedule in two lines."""
    schedule = simulation.schedule
    return (
        f"{schedule.name}: {schedule.num_ranks} ranks, {schedule.num_stages} stages, "
        f"{schedule.num_microbatches} microbatches\n"
        f"makespan {number(simulation.makespan)}, bubble {float(simulation.bubble):.2%}, "
        f"peak live activations {', '.join(map(str, simulation.peak_live))}"
    )


def number(value: Number) -> str:
    """Integers whole, all else to six digits."""
    return str(int(value)) if value == int(value) else f"{float(value):.6g}"


def _lanes(simulation: Simulation) -> Iterator[tuple[str, list[TimedTask]]]:
    """(label, tasks) of every line."""
    split = overlaps(simulation)
    for rank in range(simulation.schedule.num_ranks):
        mine = [entry for entry in simulation.tasks if entry.rank == rank]
        if split:
            yield f"{rank} F", [entry for entry in mine if entry.task.kind is Kind.FORWARD]
            yield f"{rank} B", [entry for entry in mine if entry.task.kind is not Kind.FORWARD]
        else:
            yield str(rank), mine


def _scale(simulation: Simulation, room: int, *, coloured: bool) -> tuple[float, int]:
    """(columns a unit of time, columns of the shortest task): kind and number fit in it, or the number, or less."""
    lengths = [entry.end - entry.start for entry in simulation.tasks if entry.end > entry.start]
    if not lengths:
        return 1.0, 1
    shortest, makespan = float(min(lengths)), float(simulation.makespan)
    digits = len(str(simulation.schedule.num_microbatches - 1))
    most = (_BANDS if coloured else _PLAIN_BANDS) * room
    for wide in (digits + 1, digits) if coloured else (digits + 1,):
        if makespan * wide / shortest <= most:
            return wide / shortest, wide
    return most / makespan, 1


def _column(time: Number, scale: float) -> int:
    return round(float(time) * scale)


def _row(schedule: Schedule, tasks: Sequence[TimedTask], scale: float, total: int, *, coloured: bool) -> Text:
    row, column = Text(), 0
    for entry in tasks:
        start, end = _column(entry.start, scale), _column(entry.end, scale)
        row.append((" " if coloured else ".") * (start - column))
        fill, ink = colour(schedule, entry.task)
        row.append(_label(entry, end - start, coloured=coloured), style=f"{ink} on {fill}")
        column = max(column, end)
    row.append((" " if coloured else ".") * (total - column))
    return row


def _label(entry: TimedTask, width: int, *, coloured: bool) -> str:
    """Kind and microbatch as far as there is room; where there are no colours the kind comes first."""
    letter, microbatch = entry.task.kind.letter, str(entry.task.microbatch)
    texts = (letter + microbatch, microbatch if coloured else letter, "")
    text = next(text for text in texts if len(text) <= width)
    return text.ljust(width, " " if coloured else "-")


def _ruler(scale: float, total: int) -> str:
    """Times, each above the column where it begins."""
    least = _TICK / scale
    power = 10.0 ** math.floor(math.log10(least))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least)
    line, tick = [" "] * total, 0
    while (column := _column(tick * step, scale)) < total:
        for place, letter in enumerate(number(round(tick * step, 9)), start=column):
            if place < total:
                line[place] = letter
        tick += 1
    return "".join(line)


def _legend(schedule: Schedule, *, coloured: bool) -> Text:
    legend = Text()
    for kind in kinds_of(schedule):
        legend.append(f" {kind.letter} ", style=f"black on {COLOURS[kind]}" if coloured else "")
        legend.append(f" {kind}  ")
    if not coloured:
        legend.append(".  idle  ")
    if schedule.num_stages > schedule.num_ranks:
        legend.append("paler: later chunk of the rank" if coloured else "")
    legend.rstrip()
    return legend
