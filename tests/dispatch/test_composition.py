"""Each back-end with each thing that it has to work with, against one process; and the page that says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import composition, composition_page
from .composition_page import BACKENDS, COLUMNS, Cell, Composition

DOCS = Path(__file__).resolve().parents[2] / "docs"
# Every column once, and every back-end about as often; the rest takes minutes.
DIAGONAL = [
    pytest.param(BACKENDS[index % len(BACKENDS)], column, marks=[pytest.mark.slow] if "compile" in column else [])
    for index, column in enumerate(COLUMNS)
]


def expect_as_published(backend: str, column: str) -> None:
    published = composition_page.read(DOCS).cells[backend][column]
    found = composition.cell_of(backend, column)
    assert bool(found.why) == bool(published.why), f"docs say {published!r}; now it is {found!r}"


@pytest.mark.dist
@pytest.mark.parametrize(("backend", "column"), DIAGONAL)
def test_cells_on_a_diagonal(backend: str, column: str) -> None:
    expect_as_published(backend, column)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_cells(backend: str) -> None:
    for column in COLUMNS:
        expect_as_published(backend, column)


def test_the_page_is_up_to_date() -> None:
    assert (DOCS / "distributed.md").read_text(encoding="utf-8") == composition_page.page(DOCS), "run `make docs`"


def test_the_published_matrix_is_whole_and_within_its_limits() -> None:
    cells = composition_page.read(DOCS).cells
    assert tuple(cells) == BACKENDS
    for row in cells.values():
        assert tuple(row) == COLUMNS
        for column, cell in row.items():
            assert cell.why or (cell.difference is not None and cell.difference <= composition_page.limit(column))


def test_a_cell_that_does_not_work_shows_its_reason() -> None:
    cells = {backend: {column: Cell(difference=2e-16) for column in COLUMNS} for backend in BACKENDS}
    cells["padded"]["capacity"] = Cell(why="it was full.")
    text = composition_page.section(Composition(torch="9", cells=cells))
    assert f"| capacity |{' yes, 2e-16 |' * 5} **no** |" in text
    assert text.endswith("* `padded`, capacity: it was full.")


@pytest.mark.dist
def test_a_difference_and_an_error_make_a_no(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composition, "limit", lambda column: -1.0)
    assert composition.cell_of("local", "`topk`").why.endswith(" apart")
    assert "there is no dispatcher 'nobody'" in composition.cell_of("nobody", "`topk`").why
