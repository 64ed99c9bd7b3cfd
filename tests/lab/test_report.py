import base64
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from moerouters.errors import MoeroutersError
from moerouters.lab.compare import environment
from moerouters.lab.corpus import Corpus
from moerouters.lab.history import History
from moerouters.lab.measure import measure
from moerouters.lab.pictures import COLOURS, colour_of, draw_all
from moerouters.lab.ranks import Ranks
from moerouters.lab.report import require_report_extra, write_report
from moerouters.lab.results import Results, RunResult, SkippedRouter
from moerouters.lab.roster import Entrant
from moerouters.lab.summary import COLUMNS, RouterSummary, Spread, summarize
from moerouters.lab.train import Validation
from support.lab import CPU, SMALL, entrant, history_of

VOID = {"meta", "img", "br", "hr", "link", "input"}


class WellFormed(HTMLParser):
    """Fails at a tag that is closed out of order; collects what a browser would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        self.text += data + " "


def labelled(label: str) -> Entrant:
    base = entrant()
    return Entrant(label=label, name=base.name, overrides={}, provenance=base.provenance)


def results(corpus: Corpus, folder: Path) -> Results:
    """Two seeds of one router, one run that failed early, one that never began, one router that was skipped."""

    def run(label: str, seed: int, steps: int, error: str | None = None) -> RunResult:
        history, file = history_of(steps, seed=seed), f"{label}-{seed}.safetensors"
        if steps:
            history.save(folder / file)
        return measure(
            labelled(label),
            history if steps else History(),
            seed=seed,
            status="failed" if error else "completed",
            error=error,
            parameters=1,
            validation=None if error else Validation(loss=1.0 + seed / 10, max_vio=0.1),
            history_file=file if steps else None,
        )

    return Results(
        status="failed",
        started="2026-01-01T00:00:00+00:00",
        preset="tiny",
        settings=SMALL,
        corpus=corpus.info,
        environment=environment(CPU, SMALL, Ranks()),
        runs=(
            run("topk", 0, 300),
            run("topk", 1, 300),
            run("a;b=<1>", 0, 2, "boom <script>"),
            run("none", 0, 0, "early"),
        ),
        skipped=(SkippedRouter(label="broken", reason="cannot be imported & more"),),
    )


def test_report_is_one_well_formed_file(corpus: Corpus, tmp_path: Path) -> None:
    found = results(corpus, tmp_path)
    page = WellFormed()
    html = write_report(found, tmp_path).read_text("utf-8")
    page.feed(html)
    page.close()
    assert page.open == []
    assert len(page.loaded) == 3
    for source in page.loaded:
        kind, _, content = source.partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(content, validate=True).startswith(b"\x89PNG")
    assert not re.search(r"https?://|@import|<script|url\(", html)


def test_report_says_what_was_found_and_what_was_not(corpus: Corpus, tmp_path: Path) -> None:
    found = results(corpus, tmp_path)
    page = WellFormed()
    page.feed(write_report(found, tmp_path).read_text("utf-8"))
    text = " ".join(page.text.split())
    assert found.corpus.sha256 in text
    assert "2.861 +- 1.816" in text  # exp(1) and exp(1.1): 12.706 * 0.2022 / sqrt(2)
    assert "a;b=<1>, seed 0 failed after step 2 boom <script>" in text
    assert "broken took no part cannot be imported & more" in text
    assert "topk = moerouters.builtin" in text
    assert all(f"{name} {value}" in text for name, value in SMALL.model_dump().items())
    assert all(column.note in text for column in COLUMNS)


def test_pictures_are_written_without_a_window_system(corpus: Corpus, tmp_path: Path) -> None:
    import sys

    drawn = draw_all(results(corpus, tmp_path), tmp_path)
    assert [path.name for path in drawn.values()] == ["max_vio.png", "loss.png", "load.png"]
    for path in drawn.values():
        width, height = (int.from_bytes(path.read_bytes()[start : start + 4], "big") for start in (16, 20))
        assert 500 < width < 4000
        assert 300 < height < 4000
    assert "matplotlib.pyplot" not in sys.modules


def test_no_history_no_pictures(corpus: Corpus, tmp_path: Path) -> None:
    found = results(corpus, tmp_path)
    empty = found.model_copy(update={"runs": found.runs[-1:]})
    assert draw_all(empty, tmp_path) == {}
    assert "<img" not in write_report(empty, tmp_path).read_text("utf-8")


def test_a_router_has_one_colour() -> None:
    many = [RouterSummary(label=f"r{number}", runs=()) for number in range(20)]
    looks = [colour_of(many, summary.label) for summary in many]
    assert len(set(looks)) == 20
    assert [colour for colour, _ in looks[:7]] == list(COLOURS)


def test_summary_is_one_row_per_label(corpus: Corpus, tmp_path: Path) -> None:
    rows = summarize(results(corpus, tmp_path))
    assert [(row.label, row.status, len(row.runs)) for row in rows] == [
        ("topk", "completed", 2),
        ("a;b=<1>", "failed", 1),
        ("none", "failed", 1),
    ]
    by_title = {column.title: column for column in COLUMNS}
    assert rows[0].parts(by_title["perplexity"]) == ["2.861", "+- 1.816"]
    assert rows[2].parts(by_title["perplexity"]) == ["-"]
    assert rows[1].parts(by_title["dead experts"]) == ["0", "(0)"]
    assert len(rows[0].parts(by_title["AvgMaxVio"])) == 3


def test_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "jinja2" else object())
    with pytest.raises(MoeroutersError, match=r'(?s)needs jinja2.*pip install "moerouters\[lab\]"'):
        require_report_extra()


def test_the_interval_is_students_and_widens_with_few_seeds() -> None:
    three = Spread.of([1.0, 2.0, 3.0])
    assert three is not None
    assert three.half_width == pytest.approx(4.3027 / math.sqrt(3), rel=1e-3)
    many = Spread.of([1.0, 2.0] * 50)
    assert many is not None
    assert many.half_width == pytest.approx(1.96 * 0.5025 / 10, rel=1e-3)
    assert Spread.of([None, 1.0]) == Spread(1.0, None)
    assert Spread.of([None]) is None
