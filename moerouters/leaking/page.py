"""The generated part of docs/leak.md, from docs/benchmarks/leak.json.

`python -m moerouters.leaking.page record docs` measures every installed router (minutes; on a CPU the same numbers for
one version of torch); `... render docs`, part of `make docs`, writes the table. A test fails when it is stale.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from moerouters import registry
from moerouters.errors import MoeroutersError
from moerouters.lab.files import write_text
from moerouters.lab.job import set_threads
from moerouters.lab.pages import markdown_table, with_part
from moerouters.leaking.command import build_routers, measure_all
from moerouters.leaking.entropy import expert_choice_bits
from moerouters.leaking.report import Experiment, LeakReport, RouterLeak

BATCHES = (64, 256, 1024)
SAMPLES = 32


class LeakPage(BaseModel):
    """docs/benchmarks/leak.json: the same routers in batches of several sizes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    reports: tuple[LeakReport, ...]
    skipped: dict[str, str]
    """Routers that cannot be built for the experiment, and the first line of why."""


def record(docs: Path, names: Sequence[str] = ()) -> None:
    """Measure these routers, or all that are installed, and keep it."""
    set_threads()
    chosen, skipped = [], {}
    for name in names or registry.available():
        try:
            build_routers([name], (), Experiment())
        except MoeroutersError as error:
            skipped[name] = str(error).splitlines()[0]
        else:
            chosen.append(name)
    experiments = [Experiment(tokens=tokens, samples=SAMPLES) for tokens in BATCHES]
    reports = tuple(measure_all(build_routers(chosen, (), each), each) for each in experiments)
    write_text(_json(docs), LeakPage(reports=reports, skipped=skipped).model_dump_json(indent=1) + "\n")


def read(docs: Path) -> LeakPage:
    """What is committed."""
    return LeakPage.model_validate_json(_json(docs).read_bytes())


def section(page: LeakPage) -> str:
    """A row per router, a column per size of the batch; the leakiest first."""
    first = page.reports[0].experiment
    columns = [f"T = {report.experiment.tokens}" for report in page.reports]
    by_label = {
        leak.label: [report.routers[i] for report in page.reports] for i, leak in enumerate(page.reports[0].routers)
    }
    ordered = sorted(by_label.items(), key=lambda row: (-max(leak.bits for leak in row[1]), row[0]))
    rows = [[f"`{label}`", "yes" if row[0].causal else "**no**", *map(_cell, row)] for label, row in ordered]
    lines = [
        f"E = {first.num_experts}, K = {first.top_k}, {first.score}; {first.samples} futures for each of "
        f"{first.repeats} pasts at {first.positions} positions, after {first.updates} updates; torch "
        f"{page.reports[0].torch}. Bits per token and layer, with the 95% interval.",
        "",
        markdown_table(["router", "declared causal", *columns], rows),
    ]
    figure = expert_choice_bits(first.num_experts, first.top_k)
    if figure is not None:
        lines += ["", f"The figure of the paper for expert choice of this size is {figure:.1f} bits."]
    if page.skipped:
        lines += ["", "Not measured:", "", *(f"* `{name}`: {why}" for name, why in page.skipped.items())]
    return "\n".join(lines)


def rendered(text: str, page: LeakPage) -> str:
    """docs/leak.md with this table between its marks."""
    return with_part(text, "leak", section(page))


def _cell(leak: RouterLeak) -> str:
    return "0" if leak.bits == 0 else f"{leak.bits:.2f} ({leak.low:.2f} - {leak.high:.2f})"


def _json(docs: Path) -> Path:
    return docs / "benchmarks" / "leak.json"


def main(arguments: Sequence[str] | None = None) -> None:
    """The two commands of the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m moerouters.leaking.page")
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("docs", type=Path)
    recording.add_argument("routers", nargs="*", help="default: all that are installed")
    commands.add_parser("render").add_argument("docs", type=Path)
    options = parser.parse_args(arguments)
    if options.command == "record":
        record(options.docs, options.routers)
        return
    page = options.docs / "leak.md"
    write_text(page, rendered(page.read_text(encoding="utf-8"), read(options.docs)))


if __name__ == "__main__":
    main()
