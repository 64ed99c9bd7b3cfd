"""What papers claim of balancers, each held against a comparison on several seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from moerouters.lab.results import RunResult
from moerouters.lab.showcase import Showcase
from moerouters.lab.summary import RouterSummary, Spread, summarize

Verdict = Literal["reproduced", "not reproduced", "open"]


@dataclass(frozen=True)
class Claim:
    """One sentence of a paper, and how a comparison answers it."""

    text: str
    check: Callable[[Showcase], tuple[str, Verdict]]
    """What was found, in a sentence, and the verdict."""


def change_percent(runs: Iterable[RunResult], reference: Iterable[RunResult]) -> Spread | None:
    """Perplexity over that of the reference with the same seed, - 1, in percent; pairs take out the luck of a seed."""
    by_seed = {run.seed: run.perplexity for run in reference}
    pairs = [(run.perplexity, by_seed.get(run.seed)) for run in runs]
    return Spread.of(100 * (own / other - 1) for own, other in pairs if own is not None and other is not None)


def signed(spread: Spread, digits: int = 1) -> str:
    """`-1.2 +- 0.4`, with the sign also where it is positive."""
    mean = f"{spread.mean:+.{digits}f}"
    return mean if spread.half_width is None else f"{mean} +- {spread.half_width:.{digits}f}"


def _lowest(label_starts: tuple[str, ...], metric: str, showcase: Showcase) -> tuple[RouterSummary, float]:
    """The router whose label begins so with the lowest mean of the metric, and that mean."""
    found = []
    for summary in summarize(showcase.results):
        spread = Spread.of(getattr(run, metric) for run in summary.runs)
        if summary.label.startswith(label_starts) and spread is not None:
            found.append((spread.mean, summary))
    mean, summary = min(found, key=lambda item: item[0])
    return summary, mean


def lower(metric: str, name: str, own: tuple[str, ...], rivals: tuple[str, ...], factor: float) -> Claim:
    """The best of `own` has the metric lower than the best of the rivals by this factor or more."""

    def check(showcase: Showcase) -> tuple[str, Verdict]:
        best, mean = _lowest(own, metric, showcase)
        rival, other = _lowest(rivals, metric, showcase)
        found = f"`{best.label}` {mean:.3g}, the best rival `{rival.label}` {other:.3g}: {other / mean:.1f} times"
        return found, "reproduced" if other >= factor * mean else "not reproduced"

    by = "lower" if factor == 1 else f"at least {factor:g} times lower"
    return Claim(f"{name} {by} than of every rival", check)


def no_worse(own: str, reference: str) -> Claim:
    """Perplexity at or below that of the reference, seed by seed."""

    def check(showcase: Showcase) -> tuple[str, Verdict]:
        by_label = {summary.label: summary.runs for summary in summarize(showcase.results)}
        change = change_percent(by_label[own], by_label[reference])
        if change is None:
            return "no seed of both", "open"
        half = change.half_width
        if half is None:
            return f"{signed(change)}%, one seed", "open"
        settled: Verdict = "reproduced" if change.mean + half <= 0 else "open"
        return f"{signed(change)}%", "not reproduced" if change.mean - half > 0 else settled

    return Claim(f"perplexity of `{own}` at or below that of `{reference}`", check)


def balanced_at_once(label: str, bound: float) -> Claim:
    """MaxVio, mean over layers, is at most `bound` in the first batch of every seed."""

    def check(showcase: Showcase) -> tuple[str, Verdict]:
        first = [curve[0] for curve in showcase.max_vio[label]]
        return f"at most {max(first):.2f}", "reproduced" if max(first) <= bound else "not reproduced"

    return Claim(f"`{label}`: MaxVio at most {bound:g} in the first batch", check)


_OURS = "bip:variant=published"
_RIVALS = ("loss-controlled", "loss-free")
_BIP = (
    lower("sup_max_vio", "SupMaxVio of BIP", (_OURS,), _RIVALS, 5),
    lower("avg_max_vio", "AvgMaxVio of BIP", (_OURS,), _RIVALS, 1),
    *(no_worse(f"{_OURS};iterations={each}", "loss-controlled:alpha=0.1") for each in (2, 4, 8, 14)),
    no_worse(f"{_OURS};iterations=4", "loss-free:rate=0.001"),
    balanced_at_once(f"{_OURS};iterations=14", 0.5),
)
CLAIMS = {
    "bip-16": _BIP,
    "bip-64": _BIP,
    "loss-free": (
        lower("max_vio_global", "MaxVio over held-out text of loss-free", ("loss-free",), ("loss-controlled",), 5),
        no_worse("loss-free:rate=0.001", "loss-controlled:alpha=0.001"),
        no_worse("loss-free:rate=0.001", "loss-free:rule=multiplicative;rate=0.001"),
        no_worse("loss-free:rate=0.001", "loss-free:rate=0.01"),
    ),
}
