"""docs/routers.md and its pictures are what `make docs` makes of the committed JSON."""

from __future__ import annotations

from pathlib import Path

import pytest

from moerouters import available
from moerouters.lab.showcase import fingerprint
from support.routers_page import COMPARED, PICTURE, STARTED, Sources, rendered

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def sources() -> Sources:
    return Sources(DOCS)


def test_the_page_shows_the_committed_results(sources: Sources) -> None:
    page = (DOCS / "routers.md").read_text(encoding="utf-8")
    assert rendered(page, sources) == page, "stale: run `make docs`"


@pytest.mark.parametrize(("picture", "source"), [(PICTURE, COMPARED), ("cold-start.svg", STARTED)])
def test_the_pictures_were_drawn_from_them(picture: str, source: str) -> None:
    drawn = (DOCS / "images" / picture).read_text(encoding="utf-8")
    assert fingerprint((DOCS / "benchmarks" / source).read_bytes()) in drawn, "stale: run `make docs`"


def test_every_router_has_a_whole_card(sources: Sources) -> None:
    from moerouters import info

    for name in available():
        spec = info(name).spec
        assert spec.equation and spec.advice and spec.reference, name
        assert name in sources.starts, name
        assert sources.outcomes.routers[name].ran > 50, name
