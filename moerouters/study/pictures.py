"""The pictures of a study: the frontier of perplexity against step time, and the anatomy of a step."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moerouters.lab.files import atomic_path
from moerouters.lab.pictures import COLOURS, STYLE
from moerouters.study.answer import has_drifted, is_matched, perplexity_of, seeds_told
from moerouters.study.results import PARTS, ModelResult, StudyResults

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DENSE, _MOE = "#000000", [colour for colour in COLOURS if colour != "#000000"]
_DENSE_MARKS, _MOE_MARKS = "sDPX", "o^v<>"
_SHADES = (
    "#56B4E9", "#CC79A7", "#E69F00", "#009E73", "#0072B2", "#0072B2", "#7FC8A9", "#D55E00", "#999999", "#DDDDDD",
    "#FFFFFF",
)  # fmt: skip
"""Of PARTS; experts and the dense MLP share one."""


def draw_all(results: StudyResults, folder: Path) -> dict[str, Path]:
    """Write the pictures that can be drawn into `folder`/pictures. Returns {title: path} in the order of the report."""
    import matplotlib

    pictures = {
        "Frontier: perplexity against step time": ("frontier.png", draw_frontier),
        "Anatomy of a training step": ("anatomy.png", draw_anatomy),
    }
    drawn = {}
    with matplotlib.rc_context(STYLE):
        for title, (name, draw) in pictures.items():
            figure = draw(results)
            if figure is not None:
                path = folder / "pictures" / name
                with atomic_path(path) as partial:
                    figure.savefig(partial, format="png", bbox_inches="tight", metadata={"Software": None})
                drawn[title] = path
    return drawn


def draw_frontier(results: StudyResults) -> Figure | None:
    """A point per model, with the intervals of both axes; the dense ones are joined. None without a trained model."""
    points = [(model, perplexity_of(results, model.name)) for model in results.models if model.step is not None]
    known = [(model, model.step.ms, value) for model, value in points if value is not None and model.step is not None]
    if not known:
        return None
    figure, axes = _figure(9.5, 4.8)
    counts = Counter[bool]()
    for model, ms, perplexity in known:
        dense = model.router is None
        colour, mark = _look(counts[dense], dense=dense)
        counts[dense] += 1
        axes.errorbar(
            ms.value,
            perplexity.value,
            xerr=[[ms.value - ms.low], [ms.high - ms.value]],
            yerr=[[perplexity.value - perplexity.low], [perplexity.high - perplexity.value]],
            fmt=mark,
            label=model.name,
            color=colour,
            markerfacecolor=colour if dense or _holds(results, model) else "white",
            capsize=3,
        )
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")  # names beside points would overlap
    dense_points = sorted((ms.value, value.value) for model, ms, value in known if model.router is None)
    axes.plot(*zip(*dense_points, strict=True), color=_DENSE, linewidth=0.8, linestyle="--")
    axes.set(xlabel="training step, ms", ylabel="perplexity per byte, held out")
    told = f"down and to the left is better; {seeds_told(results.plan.seeds)}; hollow: no match, or none that held"
    axes.set_title(told, fontsize=9)
    axes.margins(0.15)
    return figure


def _look(index: int, *, dense: bool) -> tuple[str, str]:
    """(colour, mark) of one model among the dense ones, or among the others."""
    if dense:
        return _DENSE, _DENSE_MARKS[index % len(_DENSE_MARKS)]
    return _MOE[index % len(_MOE)], _MOE_MARKS[index // len(_MOE) % len(_MOE_MARKS)]


def _holds(results: StudyResults, model: ModelResult) -> bool:
    return is_matched(model) and not has_drifted(results, model)


def draw_anatomy(results: StudyResults) -> Figure | None:
    """A bar per model, with the parts of its step. None where no step was taken apart."""
    known = [(model.name, model.anatomy) for model in results.models if model.anatomy is not None]
    if not known:
        return None
    figure, axes = _figure(9.5, 0.9 + 0.42 * len(known))
    names = [name for name, _ in known]
    left = [0.0] * len(known)
    for part, colour in zip(PARTS, _SHADES, strict=True):
        widths = [anatomy.parts_ms.get(part, 0.0) for _, anatomy in known]
        if any(widths):
            hatch = "//" if part == "mlp" else ""
            axes.barh(names, widths, left=left, color=colour, label=part, hatch=hatch, edgecolor="white", linewidth=0.5)
            left = [so_far + width for so_far, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("ms of a training step, under the profiler")
    axes.grid(axis="y", visible=False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=5)
    return figure


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    """A figure of the object interface: pyplot would pick a window system and keep every figure in memory."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()
