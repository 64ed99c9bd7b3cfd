"""The table of known schedules on docs/pipeline.md. `python -m support.pipeline_page docs/pipeline.md` renders it."""

from __future__ import annotations

import sys
from fractions import Fraction
from pathlib import Path

from moerouters.lab.pages import markdown_table, with_part
from moerouters.pipeline import BUILDERS, build, simulate
from moerouters.pipeline.console import number

COLUMNS = ("schedule", "stages", "makespan", "bubble", "peak live activations, by rank", "makespan of the same model")


def rendered(page: str) -> str:
    """The page with its table made anew."""
    return with_part(page, "schedules", markdown_table(COLUMNS, [_known(name) for name in BUILDERS]))


def _known(name: str) -> tuple[str, ...]:
    schedule = build(name, 4, 8)
    run = simulate(schedule)
    same = Fraction(run.makespan) * schedule.num_ranks / schedule.num_stages
    peaks = ", ".join(map(str, run.peak_live))
    bubble = f"{float(run.bubble):.4f}"
    return f"`{name}`", str(schedule.num_stages), number(run.makespan), bubble, peaks, number(same)


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(rendered(path.read_text(encoding="utf-8")), encoding="utf-8")
