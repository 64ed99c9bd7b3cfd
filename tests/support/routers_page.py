"""docs/routers.md: a card for every router of this repository.

PYTHONPATH=tests python -m support.routers_page record docs    # the suite on every router; 15 minutes of one core
PYTHONPATH=tests python -m support.routers_page render docs    # page and picture, from committed JSON

Balance and quality come from docs/benchmarks/compare-routers.json (`moerouters.lab.showcase record` of a comparison of
all routers), the cold start from docs/benchmarks/cold-start.json (`moerouters.lab.cold_start record`).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from moerouters import RouterSpec, available, info
from moerouters.lab.cold_start import ColdStart, RouterStart
from moerouters.lab.files import write_text
from moerouters.lab.showcase import Showcase, fingerprint
from moerouters.lab.summary import COLUMNS, RouterSummary, summarize
from moerouters_conformance import check_router
from moerouters_conformance.docs import installed_promises, table, with_sections

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COMPARED, STARTED, CHECKED = "compare-routers.json", "cold-start.json", "conformance.json"
PICTURE = "balance-quality.svg"


class Outcome(BaseModel):
    """The suite on one router."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ran: int
    failed: tuple[str, ...]
    """Ids of rules; the plug-in's tests expect these, and README of the plug-in says why."""
    not_applicable: int


class Outcomes(BaseModel):
    """docs/benchmarks/conformance.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    suite: str
    torch: str
    profile: str
    routers: Mapping[str, Outcome]


def record(docs: Path, profile: str) -> None:
    """Run the suite on the defaults of every installed router."""
    found = {}
    for name in available():
        report = check_router(name, profile=profile, keep_going=True)  # a failure that is expected hides nothing
        failed = tuple(result.id for result in report.failures)
        found[name] = Outcome(ran=report.ran, failed=failed, not_applicable=report.totals["not_applicable"])
        print(name, found[name], flush=True)
    outcomes = Outcomes(suite=version("moerouters-conformance"), torch=version("torch"), profile=profile, routers=found)
    write_text(docs / "benchmarks" / CHECKED, outcomes.model_dump_json(indent=1) + "\n")


class Sources:
    """What is committed."""

    def __init__(self, docs: Path) -> None:
        kept = docs / "benchmarks"
        self.compared_json = (kept / COMPARED).read_bytes()
        self.compared = Showcase.model_validate_json(self.compared_json)
        self.start = ColdStart.model_validate_json((kept / STARTED).read_bytes())
        self.outcomes = Outcomes.model_validate_json((kept / CHECKED).read_bytes())
        self.starts = {router.label: router for router in self.start.routers}
        self.summaries = {summary.label: summary for summary in summarize(self.compared.results)}


def rendered(page: str, sources: Sources) -> str:
    """The page with its generated sections."""
    promises = installed_promises()
    cards = [_card(info(name).spec, sources) for name in promises]
    return with_sections(page, {"start": _start_table(sources.start), "cards": "\n\n".join(cards)})


def _card(spec: RouterSpec, sources: Sources) -> str:
    outcome = sources.outcomes.routers[spec.name]
    distribution = info(spec.name).provenance.distribution
    home = "built in" if distribution == "moerouters" else f"[{distribution}](../plugins/{distribution}/README.md)"
    parts = [f"### `{spec.name}`", spec.summary, f"{home}{f', {spec.reference}' if spec.reference else ''}."]
    if spec.equation:
        parts.append(indent(spec.equation.strip("\n"), "    "))
    if spec.advice:
        parts.append(spec.advice)
    facts = [_promises(spec), _conformance(outcome, sources.outcomes.profile)]
    if spec.name in sources.summaries:
        facts.append(_quality(sources.summaries[spec.name]))
    if spec.name in sources.starts:
        facts.append(_cost(sources.starts[spec.name]))
    parts.append("\n".join(f"* {fact}" for fact in facts))
    return "\n\n".join(parts)


def _promises(spec: RouterSpec) -> str:
    promise = spec.capabilities
    told = [
        f"hands out {promise.assignment}"
        + (f", in eval {promise.eval_assignment}" if promise.eval_assignment is not None else ""),
        "causal in training" if promise.causal else "**looks at later tokens in training**",
        "batch-invariant in eval" if promise.eval_batch_invariant else "**depends on the batch in eval**",
        f"state: {promise.state.replace('_', ' ')}",
    ]
    if promise.parameters:
        told.append("has trainable parameters of its own")
    if promise.forward_collective:
        told.append("talks to other ranks in forward")
    if promise.balance is not None:
        told.append(f"MaxVio at most {promise.balance.at_most:g} after {promise.balance.after_steps} steps")
    return f"Promises: {', '.join(told)}."


def _conformance(outcome: Outcome, profile: str) -> str:
    held = outcome.ran - len(outcome.failed)
    failed = f"; expected failures: {', '.join(outcome.failed)}" if outcome.failed else ""
    return f"Conformance, profile {profile}: {held} of {outcome.ran} rules hold{failed}."


def _quality(summary: RouterSummary) -> str:
    shown = {column.metric: " ".join(summary.parts(column)) for column in COLUMNS}
    return (
        f"Trained on the tiny preset: perplexity {shown['perplexity']}, AvgMaxVio {shown['avg_max_vio']}, "
        f"SupMaxVio {shown['sup_max_vio']}."
    )


def _cost(start: RouterStart) -> str:
    return f"Forward and update at the cold start's size: {start.ms:g} ms, {start.relative_ms:g} times plain top-k."


def _start_table(start: ColdStart) -> str:
    recipe = start.recipe
    head = ("router", "1st batch", "2nd", "10th", "last", "eval", "experts per token", "kept score", "ms")
    rows = [
        (
            f"`{r.label}`",
            *(f"{r.max_vio[index]:.3f}" for index in (0, 1, 9, -1)),
            f"{r.eval_max_vio:.3f}",
            f"{r.experts_per_token:g}",
            f"{r.kept_score:.3f}",
            f"{r.ms:.1f}",
        )
        for r in sorted(start.routers, key=lambda router: router.max_vio[0])
    ]
    told = (
        f"MaxVio of {recipe.steps} batches of {recipe.tokens} tokens, {recipe.num_experts} experts, K = "
        f"{recipe.top_k}, softmax scores, popularity of experts skewed by {recipe.skew:g}; {start.machine}."
    )
    return "\n".join([told, "", *table(head, rows)])


def draw(sources: Sources) -> Figure:
    """AvgMaxVio against perplexity, a point per router."""
    from matplotlib.figure import Figure

    from moerouters.lab.pictures import line_style

    by_metric = {column.metric: column for column in COLUMNS}
    figure = Figure(figsize=(8.5, 5.2), layout="constrained")
    axes = figure.subplots()
    for index, (label, summary) in enumerate(sources.summaries.items()):
        x, y = (float(summary.parts(by_metric[metric])[0]) for metric in ("avg_max_vio", "perplexity"))
        colour, _ = line_style(index)
        marker = "osD^"[index // 7 % 4]
        axes.plot([max(x, 1e-3)], [y], marker, color=colour, markersize=8, label=label)
    axes.set(xscale="log", xlabel="AvgMaxVio: left is balanced", ylabel="perplexity per byte: down is better")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    figure.legend(loc="outside right upper")
    return figure


def render(docs: Path) -> None:
    """Write page and picture."""
    import matplotlib

    from moerouters.lab.pictures import STYLE

    sources, page = Sources(docs), docs / "routers.md"
    write_text(page, rendered(page.read_text(encoding="utf-8"), sources))
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": "moerouters"}):
        metadata = {"Date": None, "Description": fingerprint(sources.compared_json)}
        draw(sources).savefig(docs / "images" / PICTURE, format="svg", bbox_inches="tight", metadata=metadata)


def main() -> None:
    """The two commands of the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m support.routers_page")
    parser.add_argument("command", choices=("record", "render"))
    parser.add_argument("docs", type=Path)
    parser.add_argument("--profile", default="default")
    options = parser.parse_args()
    if options.command == "record":
        record(options.docs, options.profile)
    else:
        render(options.docs)


if __name__ == "__main__":
    main()
