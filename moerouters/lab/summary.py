"""One row per router: the mean over its seeds, and how far they spread."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from moerouters.lab.results import Results, RunResult


@dataclass(frozen=True)
class Spread:
    """Mean over seeds and their sample standard deviation; None with one seed."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """None if no run has the value."""
        known = [value for value in values if value is not None]
        if not known:
            return None
        return cls(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None)

    def text(self, digits: int) -> str:
        """'1.23' or '1.23 ± 0.04'."""
        deviation = "" if self.deviation is None else f" ± {self.deviation:.{digits}f}"
        return f"{self.mean:.{digits}f}{deviation}"


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of the table: how to read it from a run, and how to print it."""

    title: str
    note: str
    """What the number is, in one sentence."""
    digits: int
    value: Callable[[RunResult], float | None]
    worst: Callable[[RunResult], float | None] | None = None
    """The same of the worst layer, printed in brackets."""


COLUMNS = (
    Column(
        title="perplexity", digits=3, value=lambda run: run.perplexity,
        note="exp of the mean cross-entropy per byte on held-out files, in eval mode; lower is better",
    ),
    Column(
        title="bits/byte", digits=3, value=lambda run: run.bits_per_byte,
        note="the same cross-entropy in bits",
    ),
    Column(
        title="AvgMaxVio", digits=3, value=lambda run: run.avg_max_vio,
        worst=lambda run: run.worst_layer and run.worst_layer.avg_max_vio,
        note="max load / mean load - 1 of a training batch, mean over batches; 0 is perfect balance",
    ),
    Column(
        title="SupMaxVio", digits=3, value=lambda run: run.sup_max_vio,
        worst=lambda run: run.worst_layer and run.worst_layer.sup_max_vio,
        note="the same, the largest of all batches",
    ),
    Column(
        title="micro AvgMaxVio", digits=3, value=lambda run: run.micro_avg_max_vio,
        worst=lambda run: run.worst_layer and run.worst_layer.micro_avg_max_vio,
        note="AvgMaxVio where a batch is one micro-batch, that is one forward pass",
    ),
    Column(
        title="MinVio", digits=3, value=lambda run: run.min_vio,
        worst=lambda run: run.worst_layer and run.worst_layer.min_vio,
        note="min load / mean load - 1 in the last step; -1 is an expert without tokens",
    ),
    Column(
        title="dead experts", digits=0, value=lambda run: run.dead_experts,
        worst=lambda run: run.worst_layer and run.worst_layer.dead_experts,
        note="experts without a token in the last step, over all layers",
    ),
    Column(
        title="step ms", digits=0, value=lambda run: run.step_ms,
        note="median time of an optimizer step",
    ),
    Column(
        title="router share %", digits=1,
        value=lambda run: None if run.router_share is None else 100 * run.router_share,
        note="part of a step in gate and router: forward, and update after the step; their backward is not counted",
    ),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RouterSummary:
    """All seeds of one label."""

    label: str
    runs: tuple[RunResult, ...]

    @property
    def status(self) -> str:
        """`completed`, or what the runs that are not are."""
        other = sorted({run.status for run in self.runs} - {"completed"})
        return ", ".join(other) or "completed"

    def cell(self, column: Column) -> str:
        """The text of a table's cell: mean over seeds, spread, worst layer in brackets; '-' without data."""
        spread = Spread.of(column.value(run) for run in self.runs)
        if spread is None:
            return "-"
        worst = Spread.of(column.worst(run) for run in self.runs) if column.worst else None
        return spread.text(column.digits) + (f" ({worst.mean:.{column.digits}f})" if worst else "")


def summarize(results: Results) -> list[RouterSummary]:
    """One summary per label, in the order of the runs."""
    labels = dict.fromkeys(run.label for run in results.runs)
    return [
        RouterSummary(label=label, runs=tuple(run for run in results.runs if run.label == label)) for label in labels
    ]
