"""README.md and its picture are what `make docs` makes of the committed JSON."""

from __future__ import annotations

from pathlib import Path

from moerouters.lab.showcase import Showcase, fingerprint, table, with_table

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "docs" / "benchmarks" / "compare-tiny.json"


def test_the_readme_shows_the_committed_result() -> None:
    showcase = Showcase.model_validate_json(SOURCE.read_bytes())
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert with_table(readme, showcase) == readme, "stale: run `make docs`"
    assert all(f"`{run.label}`" in table(showcase) for run in showcase.results.runs)


def test_the_picture_was_drawn_from_it() -> None:
    picture = (ROOT / "docs" / "images" / "compare-tiny.svg").read_text(encoding="utf-8")
    assert fingerprint(SOURCE.read_bytes()) in picture, "stale: run `make docs`"
