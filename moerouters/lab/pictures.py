"""The pictures of a comparison. A router has the same colour in all of them, and in the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from moerouters.lab.files import atomic_path
from moerouters.lab.history import History
from moerouters.lab.results import Results
from moerouters.lab.summary import RouterSummary, summarize
from moerouters.metrics import max_violation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette without yellow, which is too light for lines: told apart with every kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_STYLES = ("-", "--", ":", "-.")

STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.dpi": 110,
    "savefig.dpi": 160,
}
_MAX_COLUMNS = 200
"""Steps that a heat map shows side by side; more are averaged in bins."""


def colour_of(summaries: Sequence[RouterSummary], label: str) -> tuple[str, str]:
    """(colour, line style) of a router; with more routers than colours the style tells them apart."""
    return line_style([summary.label for summary in summaries].index(label))


def line_style(index: int) -> tuple[str, str]:
    """(colour, line style) of the line of that index; 28 differ."""
    return COLOURS[index % len(COLOURS)], _STYLES[index // len(COLOURS) % len(_STYLES)]


def draw_all(results: Results, folder: Path) -> dict[str, Path]:
    """Write every picture into `folder`/pictures. Returns {title: path} in the order of the report."""
    import matplotlib

    histories = load_histories(results, folder)
    summaries = [summary for summary in summarize(results) if summary.label in histories]
    if not summaries:
        return {}
    pictures: dict[str, tuple[str, Callable[..., Figure]]] = {
        "Who balanced: MaxVio of every training batch": ("max_vio.png", draw_max_vio),
        "Who learned: loss on the training text": ("loss.png", draw_losses),
        "Where the tokens went: load of every expert": ("load.png", draw_loads),
    }
    drawn = {}
    with matplotlib.rc_context(STYLE):
        for title, (name, draw) in pictures.items():
            path = folder / "pictures" / name
            figure = draw(summaries, histories)
            with atomic_path(path) as partial:
                figure.savefig(partial, format="png", bbox_inches="tight", metadata={"Software": None})
            drawn[title] = path
    return drawn


Histories = dict[str, list[dict[str, Tensor]]]
"""By label, the tensors of every seed's history (see moerouters.lab.history)."""


def draw_max_vio(summaries: Sequence[RouterSummary], histories: Histories) -> Figure:
    """MaxVio per step, from the loads of every run."""
    smallest = min(_resolution(tensors["loads"]) for seeds in histories.values() for tensors in seeds)
    curves = {
        label: [max_violation(tensors["loads"]).mean(dim=1).numpy() for tensors in seeds]
        for label, seeds in histories.items()
    }
    return max_vio_figure(summaries, curves, smallest=smallest)


def max_vio_figure(
    summaries: Sequence[RouterSummary], curves: Mapping[str, Sequence[Any]], *, smallest: float
) -> Figure:
    """MaxVio (mean over layers) per step on a log scale: every batch thin, a running median thick.

    curves: by label, one array [steps] per seed. smallest: the least MaxVio above 0 that a batch can have.
    """
    figure, axes = _figure(8.5, 4.6)
    for summary in summaries:
        # A perfect batch has MaxVio 0, which a log scale cannot show: it is drawn below one token too many.
        drawn = [np.maximum(curve, smallest / 2) for curve in curves[summary.label]]
        _curves(axes, summaries, summary.label, drawn, smooth=np.median)
    axes.set(yscale="log", xlabel="optimizer step", ylabel="MaxVio, mean over layers")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.margins(x=0.01)
    _legend(axes)
    return figure


def draw_losses(summaries: Sequence[RouterSummary], histories: Histories) -> Figure:
    """Training loss per router, and beside it what is left of it after the mean over routers is taken away."""
    figure, (left, right) = _figure(11.5, 4.6, columns=2)
    smoothed = {label: [_smooth(t["train_loss"].numpy(), np.mean) for t in seeds] for label, seeds in histories.items()}
    longest = max(len(curve) for curves in smoothed.values() for curve in curves)
    everyone = _mean([curve for curves in smoothed.values() for curve in curves], longest)
    for summary in summaries:
        label = summary.label
        _curves(left, summaries, label, [t["train_loss"].numpy() for t in histories[label]], smooth=np.mean)
        colour, style = colour_of(summaries, label)
        difference = _mean(smoothed[label], longest) - everyone
        right.plot(_steps(difference), difference, color=colour, linestyle=style, label=label)
    start = max(1, longest // 10)
    ends = [curve[start:] for curves in smoothed.values() for curve in curves if len(curve) > start]
    if ends:  # the first steps fall from ln 256 and would press all that follows into one line
        low, high = min(map(np.min, ends)), max(map(np.max, ends))
        left.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low) + 1e-3)
        late = [line.get_ydata()[start:] for line in right.lines]
        bound = 1.3 * max(float(np.nan_to_num(np.abs(np.asarray(values))).max(initial=0)) for values in late) + 1e-4
        right.set_ylim(-bound, bound)
    left.set(xlabel="optimizer step", ylabel="cross-entropy, nats per byte")
    right.axhline(0, color="#888888", linewidth=0.8)
    right.set(xlabel="optimizer step", ylabel="the same, minus the mean over routers", title="below 0 learns faster")
    _legend(left)
    return figure


def draw_loads(summaries: Sequence[RouterSummary], histories: Histories) -> Figure:
    """A row per router, a column per layer (first seed): load of each expert over the mean, per step."""
    from matplotlib.colors import Normalize

    layers = max(tensors["loads"].shape[1] for seeds in histories.values() for tensors in seeds)
    rows = len(summaries)
    figure, grid = _figure(1.2 + 2.1 * layers, 0.9 + 1.45 * rows, rows=rows, columns=layers, sharex="row", sharey=True)
    grid = np.asarray(grid).reshape(rows, layers)
    image = None
    for place, (row, summary) in enumerate(zip(grid, summaries, strict=True)):
        loads_SLE = histories[summary.label][0]["loads"].double()
        relative_SLE = loads_SLE / loads_SLE.mean(dim=-1, keepdim=True).clamp_min(1e-9)
        for layer, axes in enumerate(row):
            binned, last = _binned(relative_SLE[:, layer]), relative_SLE.shape[0]
            image = axes.imshow(
                np.log2(np.clip(binned.T, 2.0**-4, 2.0**4)),
                aspect="auto",
                interpolation="nearest",
                origin="lower",
                cmap="PuOr_r",
                norm=Normalize(-2, 2),
                extent=(0.5, last + 0.5, -0.5, relative_SLE.shape[-1] - 0.5),
            )
            axes.grid(False)
            axes.tick_params(labelsize=8)
            if place == 0:
                axes.set_title(f"layer {layer}", fontsize=10)
            if place == rows - 1:
                axes.set_xlabel("step", fontsize=9)
        colour, _ = colour_of(summaries, summary.label)
        row[0].set_ylabel(f"{_wrapped(summary.label)}\nexpert", fontsize=9, color=colour)
    assert image is not None
    bar = figure.colorbar(image, ax=grid, ticks=[-2, -1, 0, 1, 2], extend="both", fraction=0.03, pad=0.02)
    bar.ax.set_yticklabels(["1/4", "1/2", "1", "2", "4"])
    bar.set_label("load / mean load")
    return figure


def load_histories(results: Results, folder: Path) -> Histories:
    """The histories that lie beside the results."""
    found: Histories = {}
    for run in results.runs:
        if run.history is not None and (folder / run.history).exists():
            found.setdefault(run.label, []).append(History.load(folder / run.history).tensors())
    return found


def _figure(width: float, height: float, *, rows: int = 1, columns: int = 1, **settings: Any) -> tuple[Figure, Any]:
    """A figure of the object interface: pyplot would pick a window system and keep every figure in memory."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, **settings)


def _curves(
    axes: Axes, summaries: Sequence[RouterSummary], label: str, curves: Sequence[Any], *, smooth: Callable[..., Any]
) -> None:
    """Each seed's values thin and light; the smoothed mean over seeds thick."""
    colour, style = colour_of(summaries, label)
    for curve in curves:
        axes.plot(_steps(curve), curve, color=colour, alpha=0.25, linewidth=0.7)
    mean = _mean(curves, max(map(len, curves)))
    axes.plot(_steps(mean), _smooth(mean, smooth), color=colour, linestyle=style, linewidth=1.9, label=label)


def _mean(curves: Sequence[Any], length: int) -> Any:
    """[length]: the mean at every step over those curves that reach it, NaN where none does."""
    sums, counts = np.zeros(length), np.zeros(length)
    for curve in curves:
        sums[: len(curve)] += curve
        counts[: len(curve)] += 1
    return np.divide(sums, counts, out=np.full(length, np.nan), where=counts > 0)


def _legend(axes: Axes) -> None:
    axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=3)


def _smooth(values: Any, statistic: Callable[..., Any]) -> Any:
    """A centred running statistic over about a thirtieth of the run; shorter windows at both ends."""
    half = len(values) // 60
    return np.array([statistic(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])


def _steps(values: Any) -> Any:
    return np.arange(1, len(values) + 1)


def _resolution(loads_SLE: Tensor) -> float:
    """The smallest MaxVio above 0 that a batch can have: one token more than the mean, averaged over layers."""
    mean = float(loads_SLE[0, 0].double().mean())
    return 1 / max(mean, 1e-9) / loads_SLE.shape[1]


def _binned(values_SE: Tensor) -> Any:
    """[at most _MAX_COLUMNS, E]: means over neighbouring steps."""
    bins = torch.tensor_split(values_SE, min(_MAX_COLUMNS, values_SE.shape[0]))
    return torch.stack([part.mean(dim=0) for part in bins]).numpy()


def _wrapped(label: str, width: int = 22) -> str:
    """A long label on several lines, broken where its config begins."""
    name, _, config = label.partition(":")
    lines = [name, *(config.split(";") if config else [])]
    return "\n".join(line if len(line) <= width else line[: width - 1] + "~" for line in lines)
