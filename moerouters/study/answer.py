"""The study's question in one sentence: what equal step time buys, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moerouters.bench.timing import Ratio
from moerouters.lab.summary import Spread
from moerouters.study.results import ModelResult, StudyResults


@dataclass(frozen=True)
class Gain:
    """A MoE model's perplexity over that of its dense partner."""

    model: str
    partner: str
    change: float
    """Of perplexity, -0.03 for 3% lower: the mean over seeds, on a log scale."""
    low: float | None
    high: float | None
    """Its 95% interval over seeds, Student's t; None with one seed."""
    seeds: int

    @property
    def sure(self) -> bool:
        """Whether the interval leaves out no difference."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def gain_of(results: StudyResults, model: ModelResult) -> Gain | None:
    """Over the seeds that both have completed, in pairs. None without one, and of a dense model."""
    if model.partner is None:
        return None
    ours, theirs = results.runs_of(model.name), results.runs_of(model.partner)
    logs = [
        math.log(ours[seed].perplexity / theirs[seed].perplexity)  # type: ignore[operator]
        for seed in ours
        if seed in theirs
    ]
    spread = Spread.of(logs)
    if spread is None:
        return None
    half = spread.half_width
    low, high = (None, None) if half is None else (math.expm1(spread.mean - half), math.expm1(spread.mean + half))
    return Gain(model.name, model.partner, math.expm1(spread.mean), low, high, len(logs))


def perplexity_of(results: StudyResults, name: str) -> Ratio | None:
    """Geometric mean over seeds with its 95% interval; with one seed that is the perplexity alone."""
    values = [run.perplexity for run in results.runs_of(name).values() if run.perplexity is not None]
    if len(values) == 1:
        return Ratio(value=values[0], low=values[0], high=values[0])
    spread = Spread.of(map(math.log, values))
    if spread is None:
        return None
    half = spread.half_width or 0.0
    return Ratio(value=math.exp(spread.mean), low=math.exp(spread.mean - half), high=math.exp(spread.mean + half))


def is_matched(model: ModelResult) -> bool:
    """Whether its step time was that of its partner, when its size was searched."""
    return model.match is not None and model.match.matched


def has_drifted(results: StudyResults, model: ModelResult) -> bool:
    """Whether, when measured again, the whole interval of the ratio lies outside the band that it was matched to."""
    if model.step is None or model.step.over_partner is None:
        return False
    (least, most), again = results.plan.band, model.step.over_partner
    return again.high < least or again.low > most


def answer(results: StudyResults) -> str:
    """In one sentence, for the largest dense model that has a MoE model of its step time and a trained seed in common.

    Models without a match take no part, nor do those whose match did not hold when it was measured again.
    """
    sparse = [model for model in results.models if model.partner is not None]
    gains = {model.name: gain for model in sparse if (gain := gain_of(results, model)) is not None}
    matched = [model for model in sparse if is_matched(model)]
    held = [model for model in matched if not has_drifted(results, model)]
    trained = [model for model in held if model.name in gains]
    if not trained:
        return _no_answer(sparse, matched, held)
    largest = max((_partner_of(results, model) for model in trained), key=lambda model: model.step_s)
    rivals = [model for model in trained if model.partner == largest.name]
    best = min(rivals, key=lambda model: gains[model.name].change)
    return sentence(gains[best.name], step_ms=_step_ms(largest), rivals=len(rivals))


def sentence(gain: Gain, *, step_ms: float, rivals: int) -> str:
    """What a gain says in words."""
    who = f"the MoE model {gain.model}" if rivals == 1 else f"the best of {rivals} MoE models, {gain.model},"
    start = f"At {step_ms:.3g} ms a step, "
    if gain.low is None or gain.high is None:
        return f"{start}{who} has a perplexity {_percent(gain.change)} than the dense model's (one seed: no interval)."
    if not gain.sure:
        span = f"{_percent(gain.low)} to {_percent(gain.high)}, {gain.seeds} seeds"
        return f"{start}{who} cannot be told from the dense model: its perplexity is {_percent(gain.change)} ({span})."
    least, most = sorted((abs(gain.low), abs(gain.high)))
    span = f"{100 * least:.1f} to {most:.1%}, {gain.seeds} seeds"
    return f"{start}{who} has a perplexity {_percent(gain.change)} than the dense model's ({span})."


def _no_answer(sparse: Sequence[ModelResult], matched: Sequence[ModelResult], held: Sequence[ModelResult]) -> str:
    if held or not sparse:
        return "There is no answer yet: no MoE model and its dense partner are trained."
    start = "There is no answer at equal step time: "
    if not matched:
        return f"{start}none of {_count(len(sparse), 'MoE model')} reached the step time of its dense partner."
    told = ", ".join(
        f"{model.name} {model.step.over_partner.value:.2f}"
        for model in matched
        if model.step is not None and model.step.over_partner is not None
    )
    return f"{start}steps that were matched took another time over the dense partner's when measured again ({told})."


def _percent(change: float) -> str:
    return f"{abs(change):.1%} {'lower' if change < 0 else 'higher'}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _partner_of(results: StudyResults, model: ModelResult) -> ModelResult:
    return next(each for each in results.models if each.name == model.partner)


def _step_ms(model: ModelResult) -> float:
    return 1e3 * model.step_s if model.step is None else model.step.ms.value


def seeds_told(seeds: Sequence[int]) -> str:
    """What a reader must know about the number of seeds."""
    return "one seed: no interval" if len(seeds) == 1 else f"{len(seeds)} seeds, 95% intervals by Student's t"
