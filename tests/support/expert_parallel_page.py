"""docs/expert-parallel.md: how far the losses of spread experts are from those of one process, on the tiny preset.

PYTHONPATH=tests python -m support.expert_parallel_page measure docs     # writes the JSON; half an hour on two cores
PYTHONPATH=tests python -m support.expert_parallel_page measure docs --only mesh3d     # beside the rest
PYTHONPATH=tests python -m support.expert_parallel_page render docs      # the table, from the committed JSON
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict

from moerouters.lab.corpus import standard_library
from moerouters.lab.files import write_text
from moerouters.lab.pages import markdown_table, with_part
from moerouters.lab.presets import preset
from moerouters_conformance import pool
from support.expert_parallel import CLEAR_SEED, GLOBAL_LOSS, Course, alone, case_of, spread

STEPS = 20
DISPATCHERS = ("all_gather", "all_to_all", "hierarchical", "mesh3d", "padded", "tensor_sliced")
LIMIT = 1e-4


class Row(BaseModel):
    """One router, its routing replayed or free."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    router: str
    routing: Literal["replayed", "free"]
    seed: int
    apart: dict[str, float] = {}
    """By dispatcher, the largest difference of a loss, in nats per byte."""


ROWS = (
    *(Row(router=r, routing="replayed", seed=0) for r in ("topk", GLOBAL_LOSS, "loss-free", "bip", "loss-controlled")),
    *(Row(router=router, routing="free", seed=CLEAR_SEED) for router in ("topk", GLOBAL_LOSS)),
)


class Parity(BaseModel):
    """docs/benchmarks/expert-parallel.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    torch: str
    steps: int
    ranks: int
    rows: tuple[Row, ...] = ()


def measure(done: Callable[[Parity], None], dispatchers: Sequence[str], rows: Sequence[Row]) -> None:
    """Train every row under these dispatchers, and hand out after each what is known, beside what the rows have."""
    pool.TIMEOUT_S = 3600.0
    settings, corpus = preset("tiny").override({"validation_sequences": 64}), standard_library()
    found = list(rows)
    for index, row in enumerate(rows):
        course = Course(item=row.router, settings=settings, steps=STEPS, corpus=corpus, seed=row.seed)
        expected, recorded = alone(course)
        tape = recorded if row.routing == "replayed" else None
        cases = [case_of(course, name, tape=tape) for name in dispatchers]
        outcomes = pool.rank_pool().run(spread, cases)[0]
        apart = {name: expected.apart(outcome) for name, outcome in zip(dispatchers, outcomes, strict=True)}
        found[index] = row.model_copy(update={"apart": row.apart | apart})
        done(Parity(torch=torch.__version__, steps=STEPS, ranks=pool.WORLD_SIZE, rows=tuple(found)))


def measured(parity: Parity) -> list[str]:
    """The dispatchers that every row knows."""
    return [name for name in DISPATCHERS if all(name in row.apart for row in parity.rows)]


def table(parity: Parity) -> str:
    """The Markdown between the marks of the page."""
    names = measured(parity)
    rows = []
    for row in parity.rows:
        cells = [f"{x:.0e}" if x <= LIMIT else f"**{x:.0e}**" for x in (row.apart[name] for name in names)]
        rows.append((f"`{row.router}`", f"{row.routing}, seed {row.seed}", *cells))
    return markdown_table(("router", "routing", *(f"`{name}`" for name in names)), rows)


def rendered(page: str, parity: Parity) -> str:
    """The page with the table of `parity` in its place."""
    return with_part(page, "parity", table(parity))


def load(docs: Path) -> Parity:
    """What is committed."""
    return Parity.model_validate_json((docs / "benchmarks" / "expert-parallel.json").read_bytes())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("measure", "render"))
    parser.add_argument("docs", type=Path)
    parser.add_argument("--only", nargs="+", choices=DISPATCHERS)
    arguments = parser.parse_args()
    docs: Path = arguments.docs
    if arguments.command == "measure":
        json = docs / "benchmarks" / "expert-parallel.json"
        measure(
            lambda found: write_text(json, found.model_dump_json(indent=1) + "\n"),
            arguments.only or DISPATCHERS,
            load(docs).rows if arguments.only else ROWS,
        )
    page = docs / "expert-parallel.md"
    write_text(page, rendered(page.read_text(encoding="utf-8"), load(docs)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
