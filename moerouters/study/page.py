"""docs/study.md, its JSON and its pictures.

    python -m moerouters.study.page record FOLDER docs --note "..."   # of a finished study: benchmarks/study.json
    python -m moerouters.study.page render docs                       # the page and its pictures, from that file

`make docs` renders; a test fails when the page is stale.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from moerouters.bench.rows import Stamp, stamp
from moerouters.lab.files import write_text
from moerouters.lab.pages import markdown_table, with_part
from moerouters.lab.pictures import STYLE
from moerouters.lab.showcase import fingerprint
from moerouters.study.answer import answer, seeds_told
from moerouters.study.pictures import draw_anatomy, draw_frontier
from moerouters.study.plan import Record
from moerouters.study.results import PARTS, MeshRow, Projected, StudyResults
from moerouters.study.table import COLUMNS, DETAILS, Column, cells, communication, interval

_DRAWN = {"frontier": draw_frontier, "anatomy": draw_anatomy}


class Committed(Record):
    """docs/benchmarks/study.json."""

    schema_version: Literal[1] = 1
    run: Stamp
    """Where it ran, with what, and a remark."""
    results: StudyResults


def record(folder: Path, docs: Path, *, note: str) -> None:
    """Write benchmarks/study.json from a study's results.json, stamped with this machine: the one it ran on."""
    found = StudyResults.load(folder)
    if found is None or found.status != "completed":
        raise SystemExit(f"'{folder}' holds no completed study")
    kind: Literal["cpu", "cuda"] = "cpu" if found.environment.device == "cpu" else "cuda"
    committed = Committed(run=stamp(kind=kind, threads=found.environment.threads, note=note), results=found)
    write_text(docs / "benchmarks" / "study.json", rounded(committed))


def rounded(committed: Committed) -> str:
    """JSON with six digits of every number, so that ratios of rounded numbers are those that the study told."""

    def short(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.6g}")
        if isinstance(value, Mapping):
            return {key: short(each) for key, each in value.items()}
        return [short(each) for each in value] if isinstance(value, list) else value

    return json.dumps(short(committed.model_dump(mode="json")), indent=1) + "\n"


def load(docs: Path) -> Committed:
    """What is committed."""
    return Committed.model_validate_json((docs / "benchmarks" / "study.json").read_bytes())


def render(docs: Path) -> None:
    """Write the generated part of study.md, and its pictures."""
    import matplotlib

    source = (docs / "benchmarks" / "study.json").read_bytes()
    committed = load(docs)
    for name, draw in _DRAWN.items():
        with matplotlib.rc_context(STYLE | {"svg.hashsalt": "moerouters"}):
            figure = draw(committed.results)
            if figure is not None:
                path = docs / "images" / f"study-{name}.svg"
                path.parent.mkdir(parents=True, exist_ok=True)
                metadata = {"Date": None, "Description": fingerprint(source)}
                figure.savefig(path, format="svg", bbox_inches="tight", metadata=metadata)
    page = docs / "study.md"
    write_text(page, rendered(page.read_text(encoding="utf-8"), committed))


def rendered(page: str, committed: Committed) -> str:
    """The page with what was committed between its marks."""
    return with_part(page, "study", _shown(committed))


def _shown(committed: Committed) -> str:
    results, run = committed.results, committed.run
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items() if name in ("python", "torch"))
    note = f" **{run.note}**" if run.note else ""
    parts = [
        f"**{answer(results)}**",
        f"Preset `{results.plan.preset}`, {results.plan.budget}, {seeds_told(results.plan.seeds)}; {run.date}, "
        f"{run.device}, threads: {run.threads}; {versions}.{note}",
    ]
    if draw_frontier(results) is not None:
        parts.append("![Perplexity against step time](images/study-frontier.svg)")
    parts += [_table(results, COLUMNS), _table(results, DETAILS)]
    if any(model.anatomy for model in results.models):
        parts += ["![Where a training step goes](images/study-anatomy.svg)", _anatomy(results)]
    failed = [f"No anatomy of `{m.name}`: {m.anatomy_failed}" for m in results.models if m.anatomy_failed]
    parts += [text.replace("\n", " ") for text in failed]
    if results.mesh:
        parts += ["Over ranks, measured:", _mesh(results.mesh)]
    if results.projections:
        told = "On larger clusters, as `moerouters simulate` projects it; nothing of this was measured:"
        parts += [f"{told} ms of one layer, forward and backward.", _projection(results.projections)]
    return "\n\n".join(parts)


def _table(results: StudyResults, columns: Sequence[Column]) -> str:
    titles = [column.title for column in columns]
    return markdown_table(titles, [cells(results, model, tuple(columns)) for model in results.models])


def _anatomy(results: StudyResults) -> str:
    known = [(model.name, model.anatomy) for model in results.models if model.anatomy is not None]
    parts = [part for part in PARTS if any(part in anatomy.parts_ms for _, anatomy in known)]
    rows = []
    for name, anatomy in known:
        shares = (f"{anatomy.parts_ms.get(part, 0.0) / anatomy.step_ms:.0%}" for part in parts)
        rows.append([name, *shares, f"{anatomy.error:+.1%}", f"{anatomy.slowdown:.2f}"])
    return markdown_table(["model", *parts, "sum less step", "slower under the profiler"], rows)


def _mesh(rows: Sequence[MeshRow]) -> str:
    titles = (
        "data", "expert", "cut", "dispatcher", "step ms", "over the first", "tokens/s", "idle", "communication",
    )  # fmt: skip
    return markdown_table(
        titles,
        [
            (
                str(row.data),
                str(row.expert),
                str(row.cut),
                f"`{row.dispatcher}`",
                interval(row.ms, 1),
                interval(row.over_first, 2),
                f"{row.tokens_per_s:,.0f}",
                f"{row.idle:.0%}",
                communication(row),
            )
            for row in rows
        ],
    )


def _projection(projections: Sequence[Projected]) -> str:
    """For the most ranks: a row for each model, cluster and load, a column for each back-end; the report has all."""
    most = max(each.ranks for each in projections)
    backends = list(dict.fromkeys(each.backend for each in projections))
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for each in projections:
        if each.ranks == most:
            dropped = f", drops {each.dropped:.0%}" if each.dropped >= 0.005 else ""
            row = rows.setdefault((each.model, f"`{each.cluster}`", str(most), each.load), {})
            row[each.backend] = f"{each.ms:.3g} ({each.idle:.0%} idle{dropped})"
    titles = ["model", "cluster", "ranks", "load", *(f"`{name}`" for name in backends)]
    return markdown_table(titles, [(*key, *(row.get(name, "-") for name in backends)) for key, row in rows.items()])


def main(arguments: Sequence[str] | None = None) -> None:
    """The commands of the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m moerouters.study.page")
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("folder", type=Path)
    recording.add_argument("docs", type=Path)
    recording.add_argument("--note", default="", help="a remark that is kept with what was measured")
    commands.add_parser("render").add_argument("docs", type=Path)
    options = parser.parse_args(arguments)
    if options.command == "record":
        record(options.folder, options.docs, note=options.note)
    else:
        render(options.docs)


if __name__ == "__main__":
    main()
