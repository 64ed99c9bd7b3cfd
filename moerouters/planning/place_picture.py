"""What `moerouters place --picture` draws: how balanced placements are on held-out steps, and where load lies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moerouters.lab.files import atomic_path
from moerouters.lab.pictures import COLOURS, STYLE
from moerouters.planning.loads import LoadHistory
from moerouters.planning.packing import Floats, rank_loads
from moerouters.planning.place_report import PlacementReport
from moerouters.planning.placing import ALGORITHMS, BASELINE, Placements, imbalance

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def write_picture(history: LoadHistory, made: Mapping[str, Placements], judged: PlacementReport, path: Path) -> None:
    """How placements do on these steps, as PNG or by the suffix of the path."""
    import matplotlib

    with matplotlib.rc_context(STYLE), atomic_path(path) as partial:
        kind = path.suffix.removeprefix(".") or "png"
        draw(history, made, judged).savefig(partial, format=kind, bbox_inches="tight")


def draw(history: LoadHistory, made: Mapping[str, Placements], judged: PlacementReport) -> Figure:
    """Left: share of layers and steps up to an imbalance. Right: mean rank loads of the layer that gains most."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.5, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for index, (name, placements) in enumerate(made.items()):
        values = np.sort(imbalance(history, placements))
        style = "-" if name == judged.chosen else "--"
        shares = np.arange(1, len(values) + 1) / len(values)
        left.step(values, shares, where="post", color=COLOURS[index], linestyle=style, label=name)
    kind = "held-out" if judged.steps_held_out else "seen"
    left.set(
        xlabel=f"largest rank load over the mean, {kind} steps", ylabel="share of layers and steps", ylim=(0, 1.02)
    )
    left.legend(loc="lower right")
    _draw_ranks(right, history, made, judged.chosen)
    return figure


def _draw_ranks(axes: Axes, history: LoadHistory, made: Mapping[str, Placements], chosen: str) -> None:
    means: dict[str, dict[str, Floats]] = {}
    for name in (BASELINE, chosen):
        means[name] = {}
        for layer, loads_SE in history.layers.items():
            loads_W = rank_loads(loads_SE, made[name][layer]).mean(axis=0)
            means[name][layer] = np.sort(loads_W / max(loads_W.mean(), 1e-9))[::-1]
    layer = max(history.layers, key=lambda each: means[BASELINE][each][0] - means[chosen][each][0])
    for name, by_layer in means.items():
        ranks = np.arange(1, len(by_layer[layer]) + 1)
        axes.plot(
            ranks, by_layer[layer], color=COLOURS[list(ALGORITHMS).index(name)], marker="o", markersize=3, label=name
        )
    axes.axhline(1, color="#888888", linewidth=0.8)
    axes.set(xlabel="ranks, the most loaded first", ylabel="load over the mean of ranks", title=f"layer {layer}")
    axes.legend(loc="upper right")
