"""The picture of a study."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from moerouters.errors import MoeroutersError
from moerouters.lab.files import atomic_path
from moerouters.lab.showcase import fingerprint
from moerouters_ds_moe.study import Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKS = {"threshold": "o-", "threshold_top_k": "^:", "top_k": "s--"}


def require_matplotlib() -> None:
    """Raise MoeroutersError unless it is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MoeroutersError(
            "the picture needs matplotlib, which is not installed.",
            why="pictures come with an extra, so that a plain install stays light",
            fix='pip install "moerouters[lab]"',
        )


def render(source: Path, target: Path) -> None:
    """Draw the study in `source` (JSON) as `target` (SVG), with the fingerprint of what it was drawn from."""
    require_matplotlib()
    import matplotlib

    from moerouters.lab.pictures import STYLE

    study = Study.load(source)
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": "moerouters"}), atomic_path(target) as partial:
        metadata = {"Date": None, "Description": fingerprint(source.read_bytes())}
        draw(study).savefig(partial, format="svg", bbox_inches="tight", metadata=metadata)


def draw(study: Study) -> Figure:
    """Perplexity over that of the dense model, against the active share of all parameters."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from moerouters.lab.pictures import COLOURS

    figure = Figure(figsize=(7.5, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for (alpha, curve), colour in zip(study.curves.items(), COLOURS, strict=False):
        for inference, mark in _MARKS.items():
            points = [p for p in curve.points if p.rule.inference == inference and p.active_parameters is not None]
            places = sorted((100 * curve.part(point), curve.perplexity_ratio(point)) for point in points)
            label = f"alpha {alpha}, {inference}"
            axes.plot(*zip(*places, strict=True), mark, color=colour, markersize=4, linewidth=1.3, label=label)
    axes.axhline(1.01, color="#888888", linewidth=0.8)
    axes.axvline(40, color="#888888", linewidth=0.8)
    axes.set(xlabel="active parameters, % of all", ylabel="perplexity / dense perplexity", ylim=(0.99, 1.10))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=3, fontsize=8)
    return figure
