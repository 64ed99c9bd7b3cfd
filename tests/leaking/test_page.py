"""docs/leak.md is what `make docs` makes of the committed JSON."""

from pathlib import Path

import pytest

from moerouters.leaking import page
from moerouters.leaking.report import Experiment

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_page_shows_the_committed_numbers() -> None:
    text = (DOCS / "leak.md").read_text(encoding="utf-8")
    assert page.rendered(text, page.read(DOCS)) == text, "stale: run `make docs`"


def test_the_committed_numbers_say_what_the_page_says() -> None:
    """Whoever declares to be causal shows 0, and the same routers stand in batches of every size."""
    kept = page.read(DOCS)
    labels = [[leak.label for leak in report.routers] for report in kept.reports]
    assert all(row == labels[0] for row in labels) and {"topk", "bip"} <= set(labels[0])
    for report in kept.reports:
        for leak in report.routers:
            assert leak.bits == 0 or not leak.causal, f"{leak.label} declares causal=True"
    bip = [next(leak.bits for leak in report.routers if leak.label == "bip") for report in kept.reports]
    assert 0 < bip[-1] < bip[0]


def test_recording_and_rendering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "BATCHES", (10, 12))
    monkeypatch.setattr(page, "SAMPLES", 2)
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "leak.md").write_text("before\n<!-- leak -->\nold\n<!-- /leak -->\nafter\n")
    page.main(["record", str(tmp_path), "topk", "bip", "no-such-router"])
    page.main(["render", str(tmp_path)])
    kept = page.read(tmp_path)
    assert [report.experiment.tokens for report in kept.reports] == [10, 12]
    assert kept.skipped == {"no-such-router": "no router named 'no-such-router'."}
    text = (tmp_path / "leak.md").read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| router | declared causal | T = 10 | T = 12 |" in text
    assert "| `topk` | yes | 0 | 0 |" in text
    assert "* `no-such-router`: no router named 'no-such-router'." in text
    assert Experiment().num_experts == kept.reports[0].experiment.num_experts


def test_a_page_without_marks_is_refused() -> None:
    with pytest.raises(SystemExit, match="needs the marks"):
        page.rendered("nothing", page.read(DOCS))
