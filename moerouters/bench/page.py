"""The generated parts of docs/benchmarks.md and docs/benchmarks/log.md, from docs/benchmarks/bench-*.jsonl.

`python -m moerouters.bench.page docs`, part of `make docs`, writes them and the pictures; a test fails when they are
stale. `moerouters.bench.record` measures.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean

from moerouters.bench.pictures import draw
from moerouters.bench.rows import Line, Row, Stamp, read_lines
from moerouters.bench.tables import cells, columns, groups, spread
from moerouters.bench.targets import TARGETS, Target, Verdict, verdicts
from moerouters.bench.timing import Ratio
from moerouters.lab.files import write_text
from moerouters.lab.pages import markdown_table, with_part

_MOST_ONE_BY_ONE = 6
"""Reached goals of one target that get a line each."""
Kept = Mapping[str, Sequence[Line]]
"""Rows by name of their file: `cpu` for bench-cpu.jsonl."""


def load(docs: Path) -> dict[str, list[Line]]:
    """What is committed."""
    files = sorted((docs / "benchmarks").glob("bench-*.jsonl"))
    return {path.stem.removeprefix("bench-"): read_lines(path) for path in files}


def rendered_page(page: str, kept: Kept, images: Path) -> str:
    """docs/benchmarks.md with these rows; pictures are shown if they exist."""
    return with_part(with_part(page, "bench:goals", _goals(kept)), "bench:results", _results(kept, images))


def rendered_log(log: str, kept: Kept) -> str:
    """docs/benchmarks/log.md with the measured value under the heading of every target."""
    judged = _by_target(kept)
    for target in TARGETS:
        told = "; ".join(what for what, _ in _shown(judged.get(target.id, [])))
        log = with_part(log, f"bench:{target.id}", f"Goal {target.goal}; measured: {told}.")
    return log


def main(docs: Path) -> None:
    """Write pictures and pages."""
    kept, images = load(docs), docs / "images"
    for name, rows in kept.items():
        draw(rows, images, name=name, source=(docs / "benchmarks" / f"bench-{name}.jsonl").read_bytes())
    page, log = docs / "benchmarks.md", docs / "benchmarks" / "log.md"
    write_text(page, rendered_page(page.read_text(encoding="utf-8"), kept, images))
    write_text(log, rendered_log(log.read_text(encoding="utf-8"), kept))


def _goals(kept: Kept) -> str:
    """Every target with what was measured of it."""
    judged = _by_target(kept)
    rows = []
    for target in TARGETS:
        told, states = ("<br>".join(each) for each in zip(*_shown(judged.get(target.id, [])), strict=True))
        rows.append([f"{_kind(target)}: {target.text}", target.goal, told, states])
    return markdown_table(["target", "goal", "measured", "reached"], rows)


def _results(kept: Kept, images: Path) -> str:
    parts: list[str] = []
    for name, rows in kept.items():
        parts += [f"### bench-{name}.jsonl", *_runs(rows)]
        for part, what in (("layer", "Time of layers over a dense MLP"), ("growth", "Time as the work grows")):
            picture = images / f"bench-{name}-{part}.svg"
            if picture.exists():
                parts.append(f"![{what}](images/{picture.name})")
        grown = [row for row in rows if row.grows]
        if grown:
            parts.append(_growth(grown))
        for group, shown in groups(row for row in rows if not row.grows).items():
            parts.append(f"{group.title}:")
            parts.append(markdown_table(columns(shown), [cells(row, shown) for row in shown]))
    return "\n\n".join(parts) if parts else "Nothing is measured yet."


def _growth(rows: Sequence[Row]) -> str:
    """How fast time grows: the power of the growing number, over the upper half of the series."""
    found = []
    for letter in dict.fromkeys(row.grows for row in rows):
        for impl in dict.fromkeys(row.impl for row in rows if row.grows == letter):
            for allocator in dict.fromkeys(row.allocator for row in rows):
                times = sorted(
                    (row.sizes[letter], row.median_ms)
                    for row in rows
                    if (row.grows, row.impl, row.allocator) == (letter, impl, allocator)
                )
                if len(times) > 1:
                    span = f"{times[0][0]} - {times[-1][0]}"
                    ends = f"{times[0][1]:.3g} - {times[-1][1]:.3g}"
                    found.append([letter, span, impl, allocator, ends, f"{growth_power(times):.2f}"])
    return markdown_table(["grows", "through", "impl", "allocator", "ms", "power"], found)


def growth_power(times: Sequence[tuple[int, float]]) -> float:
    """p where time grows as size ** p: the mean slope on log scales between neighbours in the upper half."""
    from math import log

    upper = times[(len(times) - 1) // 2 :]
    return fmean(log(t1 / t0) / log(n1 / n0) for (n0, t0), (n1, t1) in pairwise(upper))


def _runs(rows: Sequence[Line]) -> list[str]:
    """Device and versions, once for all runs of the file that share them, and their commits."""
    runs: dict[str, list[Stamp]] = {}
    for row in rows:
        found = runs.setdefault(row.run.model_copy(update={"commit": ""}).model_dump_json(), [])
        if row.run not in found:
            found.append(row.run)
    told = []
    for (run, *_), commits in ((same, ", ".join(run.commit or "unknown" for run in same)) for same in runs.values()):
        versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
        note = f" **{run.note}**" if run.note else ""
        told.append(f"* {run.date}, {run.device}, threads: {run.threads}; {versions}; commit {commits}.{note}")
    return ["\n".join(told)]


def _by_target(kept: Kept) -> dict[str, list[Verdict]]:
    found: dict[str, list[Verdict]] = {}
    for rows in kept.values():
        if rows:
            for verdict in verdicts(rows, kind=rows[0].run.kind):
                found.setdefault(verdict.target.id, []).append(verdict)
    return found


def _shown(found: Sequence[Verdict]) -> Sequence[tuple[str, str]]:
    """(what was measured, whether it is reached) one by one; where many are reached, those in one."""
    if not found:
        return [("not measured", "")]
    shown = [(_told(each), "**no**" if each.reached == "no" else each.reached) for each in found]
    values = [each.value for each in found if each.reached == "yes"]
    if len(values) <= _MOST_ONE_BY_ONE:
        return shown
    others = [each for each in shown if each[1] != "yes"]
    rest = f"{len(values)} {'more' if others else 'in all'}: {min(values):.3f} to {max(values):.3f}"
    return [*others, (rest, "yes")]


def _told(verdict: Verdict) -> str:
    named = "" if verdict.impl == verdict.target.impl else f"{verdict.impl}, "
    value = spread(Ratio(value=verdict.value, low=verdict.low, high=verdict.high))
    return f"{named}allocator {verdict.allocator} {value}"


def _kind(target: Target) -> str:
    return "CPU" if target.kind == "cpu" else "GPU"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
