"""What both pictures of a schedule share: a colour for each kind and chunk, and the lanes of a rank."""

from __future__ import annotations

from moerouters.pipeline.schedule import Kind, Schedule, Task
from moerouters.pipeline.simulate import Simulation

# Of Okabe and Ito's palette, told apart with every kind of colour vision.
COLOURS = {
    Kind.FORWARD: "#0072B2",
    Kind.BACKWARD: "#E69F00",
    Kind.INPUT_BACKWARD: "#009E73",
    Kind.WEIGHT_BACKWARD: "#CC79A7",
}
_PALEST = 0.6
"""Share of white in the colour of a rank's last chunk."""


def colour(schedule: Schedule, task: Task) -> tuple[str, str]:
    """(fill, ink) as #rrggbb: the kind's colour, paler for each later chunk of the rank, and black or white on it."""
    stages = schedule.stages_of(schedule.placement[task.stage])
    white = _PALEST * stages.index(task.stage) / max(1, len(stages) - 1)
    code = COLOURS[task.kind]
    channels = [int(code[at : at + 2], 16) for at in (1, 3, 5)]
    red, green, blue = (round(value + (255 - value) * white) for value in channels)
    bright = 0.299 * red + 0.587 * green + 0.114 * blue > 130
    return f"#{red:02x}{green:02x}{blue:02x}", "#000000" if bright else "#ffffff"


def kinds_of(schedule: Schedule) -> list[Kind]:
    """The kinds that occur, in the order of Kind."""
    found = {task.kind for _, task in schedule.tasks()}
    return [kind for kind in Kind if kind in found]


def overlaps(simulation: Simulation) -> bool:
    """Whether a rank runs two tasks at a time somewhere: then forwards and backwards have lanes of their own."""
    pairs = zip(simulation.tasks, simulation.tasks[1:], strict=False)
    return any(one.rank == two.rank and two.start < one.end for one, two in pairs)
