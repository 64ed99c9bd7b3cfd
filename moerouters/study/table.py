"""The rows of a study as text, for the terminal, the report and the page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moerouters.bench.timing import Ratio
from moerouters.study.answer import gain_of, has_drifted, is_matched, perplexity_of
from moerouters.study.results import Inference, MeshRow, ModelResult, StudyResults


@dataclass(frozen=True)
class Column:
    """A column: its title, what it says of a model, and what that is."""

    title: str
    cell: Callable[[StudyResults, ModelResult], str]
    note: str


def interval(ratio: Ratio | None, digits: int = 3) -> str:
    """value (low to high); '-' without one."""
    if ratio is None:
        return "-"
    value = f"{ratio.value:.{digits}f}"
    return value if ratio.low == ratio.high else f"{value} ({ratio.low:.{digits}f} to {ratio.high:.{digits}f})"


def communication(row: MeshRow) -> str:
    """Its part of a step, by the anatomy."""
    if row.anatomy is None:
        return "-"
    return f"{row.anatomy.parts_ms.get('communication', 0.0) / row.anatomy.step_ms:.0%}"


def percent(change: float) -> str:
    """+3.1% of 0.031."""
    return f"{change:+.1%}"


def _shape(_: StudyResults, model: ModelResult) -> str:
    s = model.settings
    if model.router is None:
        return f"D {s.hidden_size}, L {s.num_layers}, F {s.dense_size}"
    shared = f" + {s.shared_size}" if s.shared_size else ""
    return f"E {s.num_experts}, K {s.top_k}, F {s.expert_size}{shared}"


def _parameters(_: StudyResults, model: ModelResult) -> str:
    if model.active_parameters == model.parameters:
        return short(model.parameters)
    return f"{short(model.active_parameters)} of {short(model.parameters)}"


def _matched(_: StudyResults, model: ModelResult) -> str:
    if model.match is None:
        return "-"
    return interval(model.match.ratio, 2) + ("" if model.match.matched else " NO MATCH")


def _again(results: StudyResults, model: ModelResult) -> str:
    if model.step is None:
        return "-"
    return interval(model.step.over_partner, 2) + (
        " DID NOT HOLD" if is_matched(model) and has_drifted(results, model) else ""
    )


def _step(_: StudyResults, model: ModelResult) -> str:
    return "-" if model.step is None else f"{model.step.ms.value:.3g}"


def _perplexity(results: StudyResults, model: ModelResult) -> str:
    return interval(perplexity_of(results, model.name))


def _gain(results: StudyResults, model: ModelResult) -> str:
    gain = gain_of(results, model)
    if gain is None:
        return "-"
    if gain.low is None or gain.high is None:
        return f"{percent(gain.change)} (one seed)"
    return f"{percent(gain.change)} ({percent(gain.low)} to {percent(gain.high)})"


def _equal_shape(_: StudyResults, model: ModelResult) -> str:
    if model.match is None:
        return "-"
    first = model.match.tries[0]
    return f"{percent(first.ratio.value - 1)} at {model.match.knob.removeprefix('expert_')} {first.value}"


def _inferred(number: Callable[[Inference], str]) -> Callable[[StudyResults, ModelResult], str]:
    return lambda _, model: "-" if model.inference is None else number(model.inference)


def short(number: float) -> str:
    """12.3k, 4.56M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def _over_peer(ratio: Callable[[Inference], Ratio | None]) -> Callable[[Inference], str]:
    def told(found: Inference) -> str:
        over = ratio(found)
        return "-" if over is None else f"{interval(over, 2)} of {found.peer}"

    return told


COLUMNS = (
    Column("model", lambda _, model: model.name, "dense, or the MoE model's row name"),
    Column("shape", _shape, "width D, layers L, width F of the MLP or of an expert (+ shared), E experts, K per token"),
    Column("perplexity", _perplexity, "per byte of held-out text, in eval mode; geometric mean of seeds, 95% interval"),
    Column("over dense", _gain, "its perplexity over the dense partner's, in pairs of seeds, 95% interval"),
    Column("active", _parameters, "parameters that a token meets in training, of all"),
    Column("tokens", lambda _, model: short(model.tokens), "bytes that it was trained on"),
    Column("step ms", _step, "whole training step, median of rounds in which all models take turns, after training"),
    Column("matched", _matched, "step time over the dense partner's when the size was searched, 95% interval"),
    Column("again", _again, "the same after training, all models in turn"),
)

DETAILS = (
    COLUMNS[0],
    Column(
        "step over dense at equal shape",
        _equal_shape,
        "step time over the dense partner's with the same active width K * F, the first size that the search tried",
    ),
    Column("prefill tokens/s", _inferred(lambda i: short(i.prefill_tokens_per_s)), "of whole prompts"),
    Column(
        "prefill time over peer",
        _inferred(_over_peer(lambda i: i.prefill_over_peer)),
        "over the dense model of nearest perplexity",
    ),
    Column("decode tokens/s", _inferred(lambda i: short(i.decode_tokens_per_s)), "one token at a time, with a cache"),
    Column("decode time over peer", _inferred(_over_peer(lambda i: i.decode_over_peer)), "as before"),
    Column(
        "MiB: weights, cache, peak of prefill, of decoding",
        _inferred(
            lambda i: f"{i.parameters_mib:.3g}, {i.cache_mib:.3g}, {i.prefill_peak_mib:.3g}, {i.decode_peak_mib:.3g}"
        ),
        "peaks are of what lies beside the weights; that of prefill holds the cache, that of decoding does not",
    ),
)


def cells(results: StudyResults, model: ModelResult, columns: tuple[Column, ...] = COLUMNS) -> list[str]:
    """One row."""
    return [column.cell(results, model) for column in columns]
