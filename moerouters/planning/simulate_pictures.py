"""Pictures of a Simulation: where the time goes, which back-end is the fastest where, what uneven loads cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moerouters.lab.files import atomic_path
from moerouters.lab.pictures import COLOURS, STYLE
from moerouters.planning.simulation import STAGES, Estimate, Simulation, winners

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STAGE_COLOURS = dict(zip(STAGES, ("#999999", "#CC79A7", "#56B4E9", "#009E73", "#0072B2", "#D55E00"), strict=True))
_HATCHED: dict[str, Any] = {"facecolor": "none", "edgecolor": "#555555", "hatch": "///", "linewidth": 0}
_CUT = 2.5
"""Bars are cut at so many times the fastest back-end's longest; beyond that only their number is of interest."""


def write_picture(found: Simulation, path: Path) -> None:
    """As PNG, or by the suffix of the path."""
    import matplotlib

    with matplotlib.rc_context(STYLE), atomic_path(path) as partial:
        kind = path.suffix.removeprefix(".") or "png"
        draw(found).savefig(partial, format=kind, bbox_inches="tight")


def draw(found: Simulation) -> Figure:
    """All three."""
    from matplotlib.figure import Figure

    backends = {each.backend for each in found.estimates}
    figure = Figure(figsize=(max(11.0, 2.6 * len(backends)), 8.6), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(1.1, 1))
    upper, lower = parts
    draw_stages(upper, found)
    left, right = lower.subplots(1, 2, width_ratios=(1.25, 1))
    draw_winners(left, found)
    draw_idle(right, found)
    return figure


def draw_stages(figure: Any, found: Simulation, *, load: str | None = None) -> None:
    """A panel per back-end, a bar per number of ranks, a colour per stage; under the first load, or that one. Bars of
    what does not fit the memory are hatched."""
    load = found.estimates[0].load if load is None else load
    shown = [each for each in found.estimates if each.load == load]
    backends = list(dict.fromkeys(each.backend for each in shown))
    worlds = sorted({each.ranks for each in shown})
    top = _CUT * max(min(e.total_ms for e in shown if e.ranks == world) for world in worlds)
    top = min(top, max(e.total_ms for e in shown))
    panels = figure.subplots(1, len(backends), sharey=True, squeeze=False)[0]
    for axes, backend in zip(panels, backends, strict=True):
        for each in shown:
            if each.backend == backend:
                _bar(axes, each, worlds.index(each.ranks), top)
        axes.set_title(backend, fontsize=10)
        axes.set_xticks(range(len(worlds)), [_short(world) for world in worlds], fontsize=8)
        axes.set_xlabel("ranks", fontsize=9)
        axes.set_ylim(0, 1.08 * top)
        axes.grid(axis="x", visible=False)
    panels[0].set_ylabel(f"ms a layer, forward and backward\nload {load}", fontsize=9)
    labels = [name for name in STAGES if any(each.stage_ms(name) for each in shown)]
    handles = [_patch(_STAGE_COLOURS[name]) for name in labels]
    if not all(each.fits for each in shown):
        from matplotlib.patches import Patch

        labels.append("does not fit the memory")
        handles.append(Patch(**_HATCHED))
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels))


def draw_winners(axes: Axes, found: Simulation) -> None:
    """A cell per load and number of ranks: the fastest back-end, and its milliseconds."""
    best = winners(found)
    loads = list(dict.fromkeys(each.load for each in found.estimates))
    worlds = sorted({each.ranks for each in found.estimates})
    backends = list(dict.fromkeys(each.backend for each in found.estimates))
    for row, load in enumerate(loads):
        for column, world in enumerate(worlds):
            winner = best.get((load, world))
            colour = "#eeeeee" if winner is None else _light(COLOURS[backends.index(winner.backend) % len(COLOURS)])
            axes.add_patch(_patch(colour, (column - 0.5, row - 0.5)))
            text = "none\nfits" if winner is None else f"{winner.backend}\n{_told(winner.total_ms)} ms"
            axes.text(column, row, text, ha="center", va="center", fontsize=7)
    axes.set_xlim(-0.5, len(worlds) - 0.5)
    axes.set_ylim(len(loads) - 0.5, -0.5)
    axes.set_xticks(range(len(worlds)), [_short(world) for world in worlds])
    axes.set_yticks(range(len(loads)), loads, fontsize=8)
    axes.set(xlabel="ranks", title="the fastest back-end that fits")
    axes.grid(False)


def draw_idle(axes: Axes, found: Simulation, *, backend: str | None = None) -> None:
    """Part of the time that ranks wait for the slowest, against the number of ranks: a line per load."""
    names = list(dict.fromkeys(each.backend for each in found.estimates))
    backend = ("all_to_all" if "all_to_all" in names else names[0]) if backend is None else backend
    worlds = sorted({each.ranks for each in found.estimates})
    for index, load in enumerate(dict.fromkeys(each.load for each in found.estimates)):
        line = [each for each in found.estimates if (each.load, each.backend) == (load, backend)]
        shares = [100 * each.stage_ms("idle") / each.total_ms for each in line]
        places = [worlds.index(each.ranks) for each in line]
        style = "-" if index < len(COLOURS) else "--"
        colour = COLOURS[index % len(COLOURS)]
        axes.plot(places, shares, color=colour, linestyle=style, marker="o", markersize=3, label=load)
    axes.set_xticks(range(len(worlds)), [_short(world) for world in worlds])
    axes.set(xlabel="ranks", ylabel=f"% of {backend} spent waiting", title="what uneven loads cost")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7, loc="best")


def _bar(axes: Axes, each: Estimate, place: int, top: float) -> None:
    bottom = 0.0
    for name in STAGES:
        height = min(each.stage_ms(name), max(top - bottom, 0.0))
        axes.bar(place, height, bottom=bottom, width=0.8, color=_STAGE_COLOURS[name])
        bottom += height
    if not each.fits:
        axes.bar(place, bottom, width=0.8, **_HATCHED)
    if each.total_ms > top:
        axes.plot([place - 0.5, place + 0.5], [0.94 * top, 0.96 * top], color="white", linewidth=3)
    axes.text(place, bottom, _told(each.total_ms), ha="center", va="bottom", fontsize=7)


def _patch(colour: str, corner: tuple[float, float] = (0.0, 0.0)) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(corner, 1, 1, facecolor=colour, edgecolor="white")


def _light(colour: str) -> str:
    channels = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)])
    return "#" + "".join(f"{int(channel):02x}" for channel in 255 - (255 - channels) * 0.45)


def _told(ms: float) -> str:
    return f"{ms:.3g}" if ms < 1000 else f"{ms:,.0f}"


def _short(ranks: int) -> str:
    return f"{ranks // 1024}k" if ranks >= 1024 and ranks % 1024 == 0 else str(ranks)
