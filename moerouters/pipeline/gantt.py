"""A schedule as a Gantt chart in a file, SVG or PNG. matplotlib comes with the extra `moerouters[lab]`."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moerouters.errors import MoeroutersError
from moerouters.pipeline.console import number
from moerouters.pipeline.look import COLOURS, colour, kinds_of, overlaps
from moerouters.pipeline.schedule import Kind
from moerouters.pipeline.simulate import Simulation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE: dict[Any, Any] = {"font.size": 10, "svg.hashsalt": "moerouters", "svg.fonttype": "none"}
_ROW = 0.42
"""Inches that a rank is high."""
_NARROWEST, _WIDEST = 7.0, 36.0
"""Inches; the chart is as wide as numbers of 7 points need."""
_POINT = 1 / 72
_SMALLEST = 3.5
"""Points; smaller numbers are left out."""


def draw(simulation: Simulation, path: Path, *, format: Literal["svg", "png"]) -> None:
    """Write the chart. Equal simulations give equal files."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise MoeroutersError(
            "a chart needs matplotlib, which is not installed.", why=str(error), fix='pip install "moerouters[lab]"'
        ) from error
    metadata = {"Date": None} if format == "svg" else {"Software": None}
    with matplotlib.rc_context(_STYLE):
        gantt(simulation).savefig(path, format=format, bbox_inches="tight", dpi=160, metadata=metadata)


def gantt(simulation: Simulation) -> Figure:
    """The chart as a figure: a row a rank, a box a task with its microbatch in it."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    schedule, makespan = simulation.schedule, float(simulation.makespan) or 1.0
    digits = len(str(schedule.num_microbatches - 1))
    lengths = [float(entry.end - entry.start) for entry in simulation.tasks if entry.end > entry.start]
    wanted = makespan / min(lengths, default=1.0) * (digits + 1) * 0.6 * 7 * _POINT
    width = min(max(wanted, _NARROWEST), _WIDEST)
    figure = Figure(figsize=(width + 0.8, _ROW * schedule.num_ranks + 1.3), layout="constrained")
    axes = figure.subplots()
    half = overlaps(simulation)
    height = 0.43 if half else 0.86
    spans: defaultdict[tuple[float, str], list[tuple[float, float]]] = defaultdict(list)
    for entry in simulation.tasks:
        start, length = float(entry.start), float(entry.end - entry.start)
        middle = entry.rank + (0.5 if entry.task.kind is not Kind.FORWARD else -0.5) * height * half
        fill, ink = colour(schedule, entry.task)
        spans[middle, fill].append((start, length))
        text = str(entry.task.microbatch)
        room = length / makespan * width / _POINT / (0.65 * len(text))  # points that a digit may be wide
        size = min(9.0, room, 0.6 * _ROW * height / _POINT)
        if size >= _SMALLEST:
            axes.text(start + length / 2, middle, text, ha="center", va="center_baseline", color=ink, fontsize=size)
    for (middle, fill), bars in spans.items():
        axes.broken_barh(bars, (middle - height / 2, height), facecolor=fill, edgecolor="white", linewidth=0.6)
    axes.set(
        xlim=(0, makespan), ylim=(schedule.num_ranks - 0.5, -0.5), xlabel="time", ylabel="rank",
        yticks=range(schedule.num_ranks),
    )  # fmt: skip
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_facecolor("#f2f2f2")
    peaks = ", ".join(map(str, dict.fromkeys(simulation.peak_live)))
    axes.set_title(
        f"{schedule.name}: makespan {number(simulation.makespan)}, bubble {float(simulation.bubble):.1%}, "
        f"peak live activations {peaks}",
        loc="left",
        fontsize=10,
    )
    patches = [Patch(color=COLOURS[kind], label=kind.value) for kind in kinds_of(schedule)]
    patches.append(Patch(facecolor="#f2f2f2", edgecolor="#bbbbbb", label="idle"))
    chunks = schedule.num_stages > schedule.num_ranks
    figure.legend(
        handles=patches, loc="outside lower left", ncols=len(patches), frameon=False, fontsize=9,
        title="later chunks of a rank are paler" if chunks else None, title_fontsize=9, alignment="left",
    )  # fmt: skip
    return figure
