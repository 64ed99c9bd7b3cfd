"""Run every cell of the composition matrix on four ranks, and write docs/benchmarks/composition.json and the page.

python -m tests.dispatch.composition docs
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import torch

from moerouters_conformance.pool import rank_pool
from moerouters_conformance.violation import Violation

from . import composition_jobs as jobs
from .composition_page import BACKENDS, COLUMNS, Cell, Composition, limit, page


def cell_of(backend: str, column: str) -> Cell:
    """Run one cell. What a rank raises, and ranks that do not come back, make a cell that does not work."""
    try:
        if jobs.SETTINGS[column].compile:
            rank_pool().run(jobs.load_compiler)  # a job of its own: on a busy machine it takes most of the limit
        outcomes = rank_pool().run(jobs.outcome, backend, column)
    except Violation as hung:
        return Cell(why=str(hung))
    raised = [outcome for outcome in outcomes if isinstance(outcome, str)]
    if raised:
        return Cell(why=raised[0])
    found = {name: max(outcome[name] for outcome in outcomes) for name in outcomes[0]}
    worst = max(found, key=lambda name: found[name])
    if not found[worst] <= limit(column):
        return Cell(why=f"{worst} is {found[worst]:.1e} apart")
    return Cell(difference=found[worst])


def survey(backends: Iterable[str] = BACKENDS, columns: Iterable[str] = COLUMNS) -> Composition:
    """Every cell."""
    columns = tuple(columns)
    cells = {backend: {column: cell_of(backend, column) for column in columns} for backend in backends}
    return Composition(torch=torch.__version__.partition("+")[0], cells=cells)


def main() -> None:
    """Write the matrix anew."""
    parser = argparse.ArgumentParser(prog="python -m tests.dispatch.composition")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    text = survey().model_dump_json(indent=1, exclude_defaults=True)
    (folder / "benchmarks" / "composition.json").write_text(f"{text}\n", encoding="utf-8")
    (folder / "distributed.md").write_text(page(folder), encoding="utf-8")


if __name__ == "__main__":
    main()
