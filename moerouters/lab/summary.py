"""One row per router: the mean over its seeds, and how sure it is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moerouters.lab.results import Results, RunResult

# 97.5% points of Student's t by degrees of freedom, 1 to 30; beyond, the normal distribution's is near enough.
_STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Spread:
    """Mean over seeds, and half the width of its 95% confidence interval (Student's t); None with one seed."""

    mean: float
    half_width: float | None

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """None if no run has the value."""
        known = [value for value in values if value is not None]
        if not known:
            return None
        return cls(statistics.fmean(known), _half_width(known) if len(known) > 1 else None)


def _half_width(values: Sequence[float]) -> float:
    freedom = len(values) - 1
    quantile = _STUDENT[freedom - 1] if freedom <= len(_STUDENT) else 1.96
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of the table: which metric of a run it shows, and how."""

    title: str
    metric: str
    """Field of RunResult."""
    note: str
    """What the number is, in one sentence."""
    digits: int = 3
    factor: float = 1.0
    layered: bool = False
    """Beside the model's value stands that of its worst layer."""
    terminal: bool = True
    """False: in the report only."""

    def value(self, run: RunResult) -> float | None:
        """The model's value, None if the run has none."""
        value = getattr(run, self.metric)
        return None if value is None else self.factor * value

    def worst(self, run: RunResult) -> float | None:
        """The worst layer's value, None if the run has none or the metric is not one of layers."""
        if not self.layered or run.worst_layer is None:
            return None
        return self.factor * float(getattr(run.worst_layer, self.metric))


COLUMNS = (
    Column(
        title="perplexity",
        metric="perplexity",
        note="exp of the mean cross-entropy per byte on held-out text, in eval mode; lower is better",
    ),
    Column(title="bits/byte", metric="bits_per_byte", note="the same cross-entropy in bits", terminal=False),
    Column(
        title="AvgMaxVio",
        metric="avg_max_vio",
        note="max load / mean load - 1 of a training batch, mean over batches; 0 is perfect balance",
        layered=True,
    ),
    Column(title="SupMaxVio", metric="sup_max_vio", note="the same, the largest of all batches", layered=True),
    Column(
        title="micro AvgMaxVio",
        metric="micro_avg_max_vio",
        note="AvgMaxVio where a batch is one micro-batch, that is one forward pass",
        layered=True,
    ),
    Column(
        title="global MaxVio",
        metric="max_vio_global",
        note="MaxVio over all held-out text at once, in eval mode",
        terminal=False,
    ),
    Column(
        title="MinVio",
        metric="min_vio",
        note="min load / mean load - 1 in the last step; -1 is an expert without tokens",
        layered=True,
    ),
    Column(
        title="dead experts",
        metric="dead_experts",
        note="experts without a token in the last step, over all layers",
        digits=0,
        layered=True,
    ),
    Column(title="step ms", metric="step_ms", note="median time of an optimizer step", digits=0),
    Column(
        title="router share %",
        metric="router_share",
        note="part of a step in gate and router: forward, and update after the step; their backward is not counted",
        digits=1,
        factor=100.0,
    ),
)


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

    def parts(self, column: Column) -> list[str]:
        """The text of a table's cell in parts: mean over seeds, +- spread, (worst layer); '-' without data."""
        spread = Spread.of(column.value(run) for run in self.runs)
        if spread is None:
            return ["-"]
        parts = [f"{spread.mean:.{column.digits}f}"]
        if spread.half_width is not None:
            parts.append(f"+- {spread.half_width:.{column.digits}f}")
        worst = Spread.of(column.worst(run) for run in self.runs)
        if worst is not None:
            parts.append(f"({worst.mean:.{column.digits}f})")
        return parts


def summarize(results: Results) -> list[RouterSummary]:
    """One summary per label, in the order of the runs."""
    labels = dict.fromkeys(run.label for run in results.runs)
    return [
        RouterSummary(label=label, runs=tuple(run for run in results.runs if run.label == label)) for label in labels
    ]
