"""The pictures of docs/benchmarks.md, each with the fingerprint of the file that it was drawn from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moerouters.bench.rows import Row
from moerouters.lab.pictures import COLOURS, STYLE
from moerouters.lab.showcase import fingerprint

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BOTH = "forward+backward"
_MARKS = "osD^vPX*"


def draw(rows: Sequence[Row], images: Path, *, name: str, source: bytes) -> list[Path]:
    """Write images/bench-NAME-layer.svg and -growth.svg, as far as there are rows for them."""
    import matplotlib

    layers = [row for row in rows if row.subject == "layer" and row.passes == _BOTH and not row.grows]
    grown = [row for row in rows if row.grows]
    drawn = []
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": "moerouters"}):
        for part, shown, make in (("layer", layers, _ratios), ("growth", grown, _growth)):
            if shown:
                path = images / f"bench-{name}-{part}.svg"
                images.mkdir(parents=True, exist_ok=True)
                metadata = {"Date": None, "Description": fingerprint(source)}
                make(shown).savefig(path, format="svg", bbox_inches="tight", metadata=metadata)
                drawn.append(path)
    return drawn


def _ratios(rows: Sequence[Row]) -> Figure:
    """Time over the dense MLP of the same FLOPs, with its interval; one panel a shape, one mark an allocator."""
    from matplotlib.ticker import LogLocator, NullLocator

    shapes = list(dict.fromkeys((row.shape, row.dtype) for row in rows))
    allocators = list(dict.fromkeys(row.allocator for row in rows))
    figure, panels = _figure(len(shapes), height=3.6)
    for axes, (shape, dtype) in zip(panels, shapes, strict=True):
        here = [row for row in rows if (row.shape, row.dtype) == (shape, dtype) and "dense_mlp" in row.over]
        impls = [name for name in dict.fromkeys(row.impl for row in here) if not name.startswith("dense")]
        for index, allocator in enumerate(allocators):
            shown = [row for row in here if row.allocator == allocator and row.impl in impls]
            ratios = [row.over["dense_mlp"] for row in shown]
            axes.errorbar(
                [ratio.value for ratio in ratios],
                [impls.index(row.impl) + 0.2 * index for row in shown],
                xerr=[
                    [max(ratio.value - ratio.low, 0) for ratio in ratios],
                    [max(ratio.high - ratio.value, 0) for ratio in ratios],
                ],
                linestyle="",
                marker=_MARKS[index],
                markersize=5,
                color=COLOURS[index],
                label=f"allocator {allocator}",
            )
        axes.set_yticks(range(len(impls)), impls)
        axes.invert_yaxis()
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.25, 1.5, 2, 3, 5) if high < 6 * low else (1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set(title=f"{shape}, {dtype}", xlabel="time over a dense MLP of the same FLOPs")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=3)
    return figure


def _growth(rows: Sequence[Row]) -> Figure:
    """Milliseconds against T, E and K on log scales, one line an implementation and allocator; dots grow linearly."""
    letters = list(dict.fromkeys(row.grows for row in rows))
    impls = list(dict.fromkeys(row.impl for row in rows))
    allocators = list(dict.fromkeys(row.allocator for row in rows))
    figure, panels = _figure(len(letters), height=3.8)
    for axes, letter in zip(panels, letters, strict=True):
        here = [row for row in rows if row.grows == letter]
        for index, impl in enumerate(impls):
            for style, allocator in zip(("-", "--"), allocators, strict=False):
                shown = [row for row in here if (row.impl, row.allocator) == (impl, allocator)]
                line = sorted((row.sizes[letter], row.median_ms) for row in shown)
                label = impl if allocator == "default" else f"{impl}, {allocator}"
                axes.plot(
                    *zip(*line, strict=True), linestyle=style, marker=_MARKS[index % len(_MARKS)], markersize=4,
                    linewidth=1, color=COLOURS[index % len(COLOURS)], label=label,
                )  # fmt: skip
        sizes = sorted({row.sizes[letter] for row in here})
        base = min(row.median_ms for row in here if row.sizes[letter] == sizes[0])
        ends = [base, base * sizes[-1] / sizes[0]]
        axes.plot([sizes[0], sizes[-1]], ends, color="#999999", linestyle=":", label="linear")
        fixed = ", ".join(f"{name} {size}" for name, size in here[0].sizes.items() if name not in (letter, "layers"))
        axes.set(xscale="log", yscale="log", xlabel=letter, ylabel="ms")
        axes.set_title(fixed, fontsize=9)
        axes.set_xticks(sizes, [_short(size) for size in sizes])
        axes.minorticks_off()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=5)
    return figure


def _short(size: int) -> str:
    return f"{size // 1024}k" if size >= 1024 else str(size)


def _figure(panels: int, *, height: float) -> tuple[Figure, Sequence[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * panels, height), layout="constrained")
    grid = figure.subplots(1, panels, squeeze=False)
    return figure, list(grid[0])
