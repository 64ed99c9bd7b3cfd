"""The README's result, made from committed JSON: `make docs` draws it, a test fails when it is stale.

`python -m moerouters.lab.showcase record FOLDER JSON` keeps what the README needs of a finished comparison;
`... render JSON README SVG` writes the table between the README's marks and the picture beside it.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from moerouters.lab.files import write_text
from moerouters.lab.pages import markdown_table, with_part
from moerouters.lab.results import Results
from moerouters.lab.summary import COLUMNS, Column, summarize

_SHOWN = ("perplexity", "avg_max_vio", "sup_max_vio", "min_vio", "dead_experts", "step_ms", "router_share")


class Showcase(BaseModel):
    """A comparison and its MaxVio curves, small enough for the repository."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    machine: str
    """Processor and cores, in words."""
    minutes: float
    """Wall time of the whole comparison."""
    results: Results
    max_vio: dict[str, list[list[float]]]
    """By label and seed: MaxVio of every step, mean over layers."""


def record(folder: Path, target: Path, *, machine: str, minutes: float) -> None:
    """Write the Showcase of the finished comparison in `folder`. Where plugins were installed is left out."""
    from moerouters.lab.pictures import load_histories
    from moerouters.metrics import max_violation

    results = Results.load(folder)
    if results is None:
        raise SystemExit(f"no results.json in '{folder}'")
    histories = load_histories(results, folder)
    curves = {
        label: [[round(v, 4) for v in max_violation(t["loads"]).mean(dim=1).tolist()] for t in seeds]
        for label, seeds in histories.items()
    }
    runs = tuple(
        run.model_copy(
            update={
                "history": None,
                "provenance": run.provenance.model_copy(update={"location": "", "requirement": ""}),
            }
        )
        for run in results.runs
    )
    kept = Showcase(machine=machine, minutes=minutes, results=results.model_copy(update={"runs": runs}), max_vio=curves)
    write_text(target, kept.model_dump_json(indent=None) + "\n")


def table(showcase: Showcase) -> str:
    """The Markdown between the README's marks."""
    results, settings = showcase.results, showcase.results.settings
    shown: list[Column] = [column for column in COLUMNS if column.metric in _SHOWN]
    seeds = sorted({run.seed for run in results.runs})
    command = "make compare" if len(seeds) == 1 else f'make compare ARGS="--seeds {len(seeds)}"'
    rows = [[f"`{each.label}`", *(" ".join(each.parts(column)) for column in shown)] for each in summarize(results)]
    return "\n".join(
        [
            f"`{command}`, preset `{results.preset}`: {settings.num_layers} layers, {settings.num_experts} experts, "
            f"K = {settings.top_k}, {settings.steps} steps of {settings.batch_tokens} bytes of "
            f"{results.corpus.name} (sha256 {results.corpus.sha256[:12]}), the same seeds and batches for every "
            f"router; {showcase.machine}, {showcase.minutes:.1f} minutes in all.",
            "",
            markdown_table(["router", *(column.title for column in shown)], rows),
            "",
            "MaxVio = max load / mean load - 1, over the batch that one update sees; AvgMaxVio and SupMaxVio are its "
            "mean and maximum over all training batches, MinVio = min load / mean load - 1 in the last step; mean over "
            "layers, worst layer in parentheses; +- is half the 95% interval over seeds. Perplexity is per byte, on "
            "held-out files.",
            "",
            "![MaxVio of every training batch](docs/images/compare-tiny.svg)",
        ]
    )


def with_table(readme: str, showcase: Showcase) -> str:
    """The README with the table of this showcase between its marks."""
    return with_part(readme, "showcase", table(showcase))


def fingerprint(data: bytes) -> str:
    """What the picture carries, so that a test can tell whether it was drawn from this JSON."""
    return f"drawn from sha256 {hashlib.sha256(data).hexdigest()}"


def draw(showcase: Showcase, target: Path, *, source: bytes) -> None:
    """The MaxVio picture as SVG, with the fingerprint of its source inside."""
    import matplotlib

    from moerouters.lab.pictures import STYLE, max_vio_figure

    summaries = [s for s in summarize(showcase.results) if s.label in showcase.max_vio]
    curves = {label: [np.array(seed) for seed in seeds] for label, seeds in showcase.max_vio.items()}
    settings = showcase.results.settings
    mean_load = settings.batch_tokens * settings.top_k / settings.num_experts
    target.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": "moerouters"}):
        figure = max_vio_figure(summaries, curves, smallest=1 / mean_load / settings.num_layers)
        figure.savefig(
            target, format="svg", bbox_inches="tight", metadata={"Date": None, "Description": fingerprint(source)}
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """The two commands of the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m moerouters.lab.showcase")
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("folder", type=Path)
    recording.add_argument("json", type=Path)
    recording.add_argument("--machine", required=True)
    recording.add_argument("--minutes", type=float, required=True)
    rendering = commands.add_parser("render")
    rendering.add_argument("json", type=Path)
    rendering.add_argument("readme", type=Path)
    rendering.add_argument("svg", type=Path)
    options = parser.parse_args(arguments)
    if options.command == "record":
        record(options.folder, options.json, machine=options.machine, minutes=options.minutes)
        return
    data = options.json.read_bytes()
    showcase = Showcase.model_validate_json(data)
    write_text(options.readme, with_table(options.readme.read_text(encoding="utf-8"), showcase))
    draw(showcase, options.svg, source=data)


if __name__ == "__main__":
    main()
