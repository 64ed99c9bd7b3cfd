"""Rows as cells, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from moerouters.bench.rows import Row
from moerouters.bench.targets import Verdict
from moerouters.bench.timing import Ratio

SHOWN = {
    "layer": ("gemm", "dense_mlp", "moerouters"),
    "router": ("softmax_topk", "copy", "topk"),
    "dispatch": ("copy",),
    "balance": ("layer_step", "topk_kthvalue"),
}
"""Of each subject, what ratios are shown to."""


class Group(NamedTuple):
    """What one table shows."""

    subject: str
    shape: str
    passes: str
    dtype: str
    allocator: str
    ranks: int
    sizes: tuple[tuple[str, int], ...]

    @property
    def title(self) -> str:
        sizes = ", ".join(f"{letter} {size}" for letter, size in self.sizes)
        ranks = f", {self.ranks} ranks" if self.ranks > 1 else ""
        where = f"{self.subject}{ranks}, {self.shape} ({sizes})"
        return f"{where}, {self.passes}, {self.dtype}, allocator {self.allocator}"


def groups(rows: Iterable[Row]) -> dict[Group, list[Row]]:
    """Rows by table, in the order in which they were measured."""
    found: dict[Group, list[Row]] = {}
    for row in rows:
        key = Group(row.subject, row.shape, row.passes, row.dtype, row.allocator, row.ranks, tuple(row.sizes.items()))
        found.setdefault(key, []).append(row)
    return found


def columns(rows: Sequence[Row]) -> list[str]:
    """Of one table."""
    over = [f"over {peer}" for peer in _peers(rows)]
    rates = list(dict.fromkeys(name for row in rows for name in row.values))
    return ["impl", "ms", *over, *rates, *(["peak MiB"] if _has_peaks(rows) else [])]


def cells(row: Row, rows: Sequence[Row]) -> list[str]:
    """One line of that table."""
    over = [spread(row.over[peer]) if peer in row.over else "" for peer in _peers(rows)]
    rates = [f"{row.values[name]:.3g}" for name in dict.fromkeys(name for r in rows for name in r.values)]
    peak = [] if not _has_peaks(rows) else ["" if row.peak_mib is None else f"{row.peak_mib:.4g}"]
    return [row.impl, f"{row.median_ms:.4g}", *over, *rates, *peak]


def aligned(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need: a narrow terminal wraps lines and cuts no number."""
    widths = [max(map(len, column)) for column in zip(titles, *lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in (titles, *lines)
    )


def spread(ratio: Ratio) -> str:
    """`1.05 (1.02-1.09)`."""
    return f"{_short(ratio.value)} ({_short(ratio.low)}-{_short(ratio.high)})"


def verdict_cells(verdict: Verdict) -> list[str]:
    """What, goal, implementation, allocator, value, reached."""
    target = verdict.target
    measured = spread(Ratio(value=verdict.value, low=verdict.low, high=verdict.high))
    return [target.text, target.goal, verdict.impl, verdict.allocator, measured, verdict.reached]


VERDICT_COLUMNS = ["target", "goal", "impl", "allocator", "measured", "reached"]


def _peers(rows: Sequence[Row]) -> list[str]:
    return [peer for peer in SHOWN[rows[0].subject] if any(peer in row.over for row in rows)]


def _has_peaks(rows: Sequence[Row]) -> bool:
    return any(row.peak_mib is not None for row in rows)


def _short(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 0.1 else f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"
