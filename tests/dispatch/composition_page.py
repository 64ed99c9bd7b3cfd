"""The matrix in docs/distributed.md from docs/benchmarks/composition.json.

    python -m tests.dispatch.composition_page docs

Needs no torch, so `make docs` runs it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from moerouters_conformance.docs import table, with_sections

BACKENDS = ("local", "all_gather", "all_to_all", "hierarchical", "mesh3d", "padded", "tensor_sliced", "auto")
COLUMNS = (
    "`topk`",
    "`loss-free`",
    "`loss-controlled`",
    "`bip`",
    "shared expert",
    "capacity",
    "two chunks",
    "gradient accumulation",
    "checkpointing, reentrant",
    "checkpointing, non-reentrant",
    "`torch.compile`",
    "bf16 autocast",
    "FSDP2",
)
EXACT, ROUNDED = 1e-10, 2.0**-6
"""Largest relative difference in float64; under autocast, where a sum of bfloat16 numbers depends on its order."""


def limit(column: str) -> float:
    return ROUNDED if column == "bf16 autocast" else EXACT


class Cell(BaseModel):
    """Whether a back-end and something else work together."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    difference: float | None = None
    """Largest relative difference to one process, of outputs, gradients and what the router learned."""
    why: str = ""
    """What stands against it; empty where it works."""

    def text(self, column: str) -> str:
        if self.why:
            return "**no**"
        assert self.difference is not None
        return f"yes, {self.difference:.0e}" if self.difference else "yes, 0"


class Composition(BaseModel):
    """docs/benchmarks/composition.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    torch: str
    cells: dict[str, dict[str, Cell]]
    """By back-end, then by what it is combined with."""


def read(folder: Path) -> Composition:
    """The committed matrix."""
    return Composition.model_validate_json((folder / "benchmarks" / "composition.json").read_bytes())


def section(composition: Composition) -> str:
    """The generated part of the page."""
    rows = [(column, *(composition.cells[backend][column].text(column) for backend in BACKENDS)) for column in COLUMNS]
    lines = [f"torch {composition.torch}, four ranks over gloo.", ""]
    lines += table(("", *(f"`{backend}`" for backend in BACKENDS)), rows)
    reasons = [
        f"* `{backend}`, {column}: {cell.why}"
        for backend in BACKENDS
        for column in COLUMNS
        if (cell := composition.cells[backend][column]).why
    ]
    return "\n".join([*lines, *(["", "What does not work:", "", *reasons] if reasons else [])])


def page(folder: Path) -> str:
    """docs/distributed.md as it should be."""
    text = (folder / "distributed.md").read_text(encoding="utf-8")
    return with_sections(text, {"composition": section(read(folder))})


def main() -> None:
    """Write the page anew."""
    parser = argparse.ArgumentParser(prog="python -m tests.dispatch.composition_page")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    (folder / "distributed.md").write_text(page(folder), encoding="utf-8")


if __name__ == "__main__":
    main()
