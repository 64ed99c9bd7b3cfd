"""docs/results.md shows the comparisons that are committed."""

from __future__ import annotations

from pathlib import Path

import pytest

from moerouters.lab.claims import CLAIMS
from moerouters.lab.protocols import protocol
from moerouters.lab.results_page import rendered, source
from moerouters.lab.showcase import Showcase, fingerprint

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_shows_what_is_committed() -> None:
    page = (DOCS / "results.md").read_text(encoding="utf-8")
    assert rendered(page, DOCS) == page, "stale: run `make docs`"


@pytest.mark.parametrize("name", [name for name in CLAIMS if source(DOCS, name).exists()])
def test_its_pictures_are_drawn_from_that(name: str) -> None:
    picture = (DOCS / "images" / f"results-{name}.svg").read_text(encoding="utf-8")
    assert fingerprint(source(DOCS, name).read_bytes()) in picture, "stale: run `make docs`"


def test_what_was_not_run_is_said_to_be_so(tmp_path: Path) -> None:
    page = "".join(f"<!-- results: {name} -->\n<!-- /results: {name} -->\n" for name in CLAIMS)
    assert rendered(page, tmp_path).count("Not run yet") == len(CLAIMS)
    with pytest.raises(SystemExit, match="needs the marks"):
        rendered("no marks", tmp_path)


def test_every_comparison_that_is_kept_ran_its_protocol_to_the_end() -> None:
    for name in CLAIMS:
        if not source(DOCS, name).exists():
            continue
        results = Showcase.model_validate_json(source(DOCS, name).read_bytes()).results
        chosen = protocol(name)
        assert results.preset == chosen.preset
        assert {run.label for run in results.runs} == set(chosen.routers)
        assert all(run.status == "completed" for run in results.runs)
