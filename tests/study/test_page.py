"""docs/study.md shows the committed study, and its pictures were drawn from it; recording writes what is rendered."""

from __future__ import annotations

from pathlib import Path

import pytest

from moerouters.lab.showcase import fingerprint
from moerouters.study import page
from moerouters.study.report import write_report
from moerouters.study.results import Anatomy, MeshRow, Projected
from support.study import around, model, results, run, three_seeds

DOCS = Path(__file__).resolve().parents[2] / "docs"
STALE = "stale: run `python -m moerouters.study.page render docs`"


def test_the_page_shows_what_is_committed() -> None:
    text = (DOCS / "study.md").read_text(encoding="utf-8")
    assert page.rendered(text, page.load(DOCS)) == text, STALE


def test_its_pictures_were_drawn_from_it() -> None:
    source = (DOCS / "benchmarks" / "study.json").read_bytes()
    for path in (DOCS / "images").glob("study-*.svg"):
        assert fingerprint(source) in path.read_text(encoding="utf-8"), f"{path.name}: {STALE}"
    assert "images/study-frontier.svg" in (DOCS / "study.md").read_text(encoding="utf-8")


def test_recording_and_rendering(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "study.md").write_text("before\n<!-- study -->\n<!-- /study -->\nafter\n", encoding="utf-8")
    row = MeshRow(
        model="topk", data=1, expert=2, dispatcher="tensor_sliced", ms=around(9.0), over_first=around(1.5),
        tokens_per_s=1000.0, idle=0.25,
        anatomy=Anatomy(parts_ms={"communication": 3.0, "other": 6.0}, step_ms=9.0, error=0.0, slowdown=1.1),
    )  # fmt: skip
    projected = [
        Projected(model="topk", cluster="v100", ranks=n, backend=name, load="uniform", ms=ms, idle=0.125, dropped=lost)
        for n in (8, 64)
        for name, ms, lost in (("padded", 3.0, 0.02), ("all_to_all", 2.5 * n, 0.0))
    ]
    found = three_seeds().model_copy(update={"mesh": (row,), "projections": tuple(projected)})
    found.save(tmp_path)
    page.main(["record", str(tmp_path), str(docs), "--note", "a remark"])
    page.main(["render", str(docs)])
    text = (docs / "study.md").read_text(encoding="utf-8")
    assert "a perplexity 3.0% lower than the dense model's" in text and "**a remark**" in text
    assert "| 1 | 2 | 1 | `tensor_sliced` | 9.0 (9.0 to 9.0) | 1.50 (1.49 to 1.51) | 1,000 | 25% | 33% |" in text
    assert (
        "| topk | `v100` | 64 | uniform | 3 (12% idle, drops 2%) | 160 (12% idle) |" in text
        and "20 (12% idle)" not in text
    )
    assert text.startswith("before\n") and text.endswith("after\n")
    assert {path.name for path in (docs / "images").iterdir()} == {"study-frontier.svg", "study-anatomy.svg"}
    assert page.rendered(text, page.load(docs)) == text
    with pytest.raises(SystemExit, match="needs the marks"):
        page.rendered("nothing", page.load(docs))


def test_an_unfinished_study_is_not_recorded(tmp_path: Path) -> None:
    for status in ("running", "failed"):
        three_seeds().model_copy(update={"status": status}).save(tmp_path)
        with pytest.raises(SystemExit, match="no completed study"):
            page.record(tmp_path, tmp_path, note="")


def test_the_report_begins_with_the_answer_and_hides_nothing(tmp_path: Path) -> None:
    found = results(
        models=(
            model("dense"),
            model("topk", ratio=1.3, matched=False).model_copy(
                update={"anatomy": None, "anatomy_failed": "the parts sum to 3 ms"}
            ),
        ),
        runs=(run("dense", 0, 6.0), run("topk", 0, 5.5)),
    )
    far = Projected(model="topk", cluster="c", ranks=64, backend="all_to_all", load="uniform", ms=1.5, idle=0.1)
    text = write_report(found.model_copy(update={"projections": (far,)}), tmp_path).read_text(encoding="utf-8")
    assert text.index("There is no answer at equal step time") < text.index("Frontier")
    assert "NO MATCH" in text and "it is too slow" in text and "the parts sum to 3 ms" in text
    assert "Nothing of this table was measured" in text
    assert 'src="http' not in text and "href" not in text
