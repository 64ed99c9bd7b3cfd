"""docs/benchmarks.md shows the committed rows; goals are judged as the page says."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

import pytest

from moerouters.bench import page, record
from moerouters.bench.case import Request
from moerouters.bench.cases import cases_of
from moerouters.bench.page import growth_power, load, rendered_log, rendered_page
from moerouters.bench.rows import Line, Result, Row, read_lines, stamp
from moerouters.bench.shapes import SHAPES
from moerouters.bench.tables import aligned
from moerouters.bench.targets import TARGETS, Target, verdicts
from moerouters.errors import ConfigError
from moerouters.lab.showcase import fingerprint

DOCS = Path(__file__).resolve().parents[2] / "docs"
STALE = "stale: run `make docs`"


def test_the_page_shows_the_committed_rows() -> None:
    text = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    assert rendered_page(text, load(DOCS), DOCS / "images") == text, STALE


def test_the_log_shows_them_too() -> None:
    text = (DOCS / "benchmarks" / "log.md").read_text(encoding="utf-8")
    assert rendered_log(text, load(DOCS)) == text, STALE


def test_pictures_were_drawn_from_them() -> None:
    files = list((DOCS / "benchmarks").glob("bench-*.jsonl"))
    assert files
    for path in files:
        named = (DOCS / "images" / f"{path.stem}-{part}.svg" for part in ("layer", "growth"))
        pictures = [picture for picture in named if picture.exists()]
        assert bool(pictures) == ('"subject":"layer"' in path.read_text(encoding="utf-8").replace(" ", ""))
        for picture in pictures:
            assert fingerprint(path.read_bytes()) in picture.read_text(encoding="utf-8"), f"{picture.name} is {STALE}"


def test_other_rows_make_another_page(tmp_path: Path) -> None:
    """The whole way: rows to pictures and pages."""
    docs = tmp_path / "docs"
    (docs / "benchmarks").mkdir(parents=True)
    for name in ("benchmarks.md", "benchmarks/log.md"):
        (docs / name).write_bytes((DOCS / name).read_bytes())
    source = DOCS / "benchmarks" / "bench-cpu-avx2.jsonl"
    kept = [line for line in source.read_text().splitlines() if '"impl":"gemm"' not in line]
    (docs / "benchmarks" / "bench-other.jsonl").write_text("\n".join(kept) + "\n")
    page.main(docs)
    text = (docs / "benchmarks.md").read_text()
    assert "### bench-other.jsonl" in text
    assert f"### {source.name}" not in text
    assert "images/bench-other-growth.svg" in text
    assert rendered_page(text, load(docs), docs / "images") == text
    assert rendered_page(text, {}, docs / "images").count("not measured") >= len(TARGETS)


def test_runs_that_differ_by_commit_alone_are_told_once() -> None:
    runs = [stamp(kind="cpu", threads=2).model_copy(update={"commit": commit}) for commit in ("one", "two", "one", "")]
    row = row_for(GOAL, low=1, high=1).model_dump(by_alias=True)
    lines = [Line(run=run, **row) for run in runs]
    (told,) = page._runs(lines)
    assert told.count("threads: 2") == 1
    assert "commit one, two, unknown." in told


def test_every_goal_has_a_shape_and_a_place_in_the_log() -> None:
    log = (DOCS / "benchmarks" / "log.md").read_text(encoding="utf-8")
    assert len({target.id for target in TARGETS}) == len(TARGETS)
    for target in TARGETS:
        assert target.shape in SHAPES
        assert f"<!-- bench:{target.id} -->" in log


GOAL = next(target for target in TARGETS if target.id == "layer-cpu-16")
PEER = next(target for target in TARGETS if target.id == "grouped-cpu-16")
MEMORY = next(target for target in TARGETS if target.id == "memory-cpu-cpu-16")


def row_for(target: Target, *, low: float, high: float, rounds: int = 15, impl: str | None = None) -> Row:
    value = (low + high) / 2
    return Row.model_validate(
        {
            "subject": target.subject, "shape": target.shape, "sizes": {}, "impl": impl or target.impl,
            "pass": target.passes, "dtype": target.dtype, "allocator": "default", "rounds": rounds, "median_ms": 1.0,
            "low_ms": 1.0, "high_ms": 1.0,
            "over": {target.measure.removeprefix("over "): {"value": value, "low": low, "high": high}},
        }
    )  # fmt: skip


@pytest.mark.parametrize(
    ("target", "low", "high", "rounds", "expected"),
    [
        (GOAL, 0.9, 1.05, 15, "yes"),
        (GOAL, 1.0, 1.2, 15, "just"),
        (GOAL, 1.06, 1.2, 15, "no"),
        (GOAL, 0.9, 1.0, 14, "too few rounds"),
        (PEER, 1.0, 1.2, 15, "yes"),
        (PEER, 0.9, 1.1, 15, "just"),
        (PEER, 0.8, 0.99, 15, "no"),
    ],
)
def test_when_a_goal_is_reached(target: Target, low: float, high: float, rounds: int, expected: str) -> None:
    (verdict,) = verdicts([row_for(target, low=low, high=high, rounds=rounds)], kind="cpu")
    assert (verdict.target, verdict.reached) == (target, expected)


def test_memory_is_compared_within_a_table() -> None:
    ours = row_for(GOAL, low=1, high=1).model_copy(update={"peak_mib": 60.0})
    theirs = row_for(GOAL, low=1, high=1, impl="hf-grouped_mm").model_copy(update={"peak_mib": 100.0, "over": {}})
    tuned = theirs.model_copy(update={"allocator": "tuned", "peak_mib": 10.0})
    found = {verdict.target.id: verdict for verdict in verdicts([ours, tuned, theirs], kind="cpu")}
    assert found[MEMORY.id].value == pytest.approx(0.6)
    assert found[MEMORY.id].reached == "yes"


def test_misses_come_first_and_rates_have_their_interval() -> None:
    rate = next(target for target in TARGETS if target.measure == "tb_per_s")
    good = row_for(GOAL, low=1, high=1)
    fast = row_for(rate, low=1, high=1).model_copy(
        update={"values": {"tb_per_s": 2.0}, "low_ms": 0.5, "high_ms": 2.0, "over": {}}
    )
    assert [verdict.reached for verdict in verdicts([good, fast], kind="cuda")] == ["just"]
    missed = row_for(PEER, low=0.1, high=0.2)
    assert [verdict.reached for verdict in verdicts([good, missed], kind="cpu")] == ["no", "yes"]


def test_many_that_reach_a_goal_share_a_line(tmp_path: Path) -> None:
    (target,) = [each for each in TARGETS if each.id == "balancer-cpu-cpu-16"]
    run = stamp(kind="cpu", threads=1)

    def line(names: str) -> str:
        shares = (0.001 * n if name != "x" else 0.5 for n, name in enumerate(names))
        rows = [row_for(target, low=share, high=share, impl=name) for name, share in zip(names, shares, strict=True)]
        kept = {"cpu": [Line(run=run, **row.model_dump(by_alias=True)) for row in rows]}
        text = rendered_page((DOCS / "benchmarks.md").read_text(encoding="utf-8"), kept, tmp_path)
        (found,) = [line for line in text.splitlines() if target.text in line]
        return found

    few, many, all_ = line("abx"), line("abcdefghx"), line("abcdefgh")
    assert few.count("allocator default") == 3 and few.endswith("| **no**<br>yes<br>yes |")
    assert many.count("allocator default") == 1
    assert many.endswith("8 more: 0.000 to 0.007 | **no**<br>yes |")
    assert all_.endswith("| 8 in all: 0.000 to 0.007 | yes |")


def test_no_cell_is_cut() -> None:
    told = aligned(["impl", "over gemm"], [["a-rather-long-name", "1.05 (1.02-1.09)"], ["b", ""]])
    assert told.splitlines() == ["impl                over gemm", "a-rather-long-name  1.05 (1.02-1.09)", "b"]


def test_powers() -> None:
    assert growth_power([(n, 3.0 * n**1.5) for n in (1, 2, 4, 8)]) == pytest.approx(1.5)
    # A constant cost at small sizes does not hide how the large ones grow.
    assert growth_power([(1, 5.0), (2, 5.0), (4, 5.0), (8, 10.0), (16, 20.0)]) == pytest.approx(1.0)


def test_recording_covers_every_goal() -> None:
    """What `record` measures holds every table that a goal asks for, and an implementation of that name."""
    for kind in ("cpu", "cuda"):
        requests = record.parts(device=kind, threads=1, trial=False)
        cases = [case for request in requests.values() for case in cases_of(request)]
        for target in TARGETS:
            if target.kind == kind:
                place = (target.subject, target.shape, target.passes, target.dtype)
                (case,) = [c for c in cases if (c.request.subject, c.shape.name, c.passes, c.dtype) == place]
                patterns = target.impl.split("|")
                assert any(fnmatch(name, pattern) for name in case.wanted() for pattern in patterns), target.id


def test_recording_a_part_keeps_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a run without --only begins anew."""
    (tmp_path / "benchmarks").mkdir()
    measured: list[str] = []

    def fake(request: Request, *, allocators: tuple[str, ...], note: str) -> Result:
        measured.append(request.subject)
        found = [
            Row(
                subject=request.subject, shape=shape.name, sizes=shape.sizes(), grows=shape.grows, impl="moerouters",
                passes="forward", dtype=request.dtype, allocator="default", rounds=request.rounds, median_ms=1.0,
                low_ms=1.0, high_ms=1.0, over={},
            )
            for shape in request.shapes
        ]  # fmt: skip
        return Result(run=stamp(kind="cpu", threads=1, note=note), rows=tuple(found))

    monkeypatch.setattr(record, "run", fake)
    monkeypatch.setattr(page, "main", lambda docs: None)
    target = tmp_path / "benchmarks" / "bench-cpu.jsonl"
    record.main([str(tmp_path), "--trial", "--note", "first"])
    first = read_lines(target)
    assert measured == ["layer", "router", "dispatch", "balance", "layer", "layer", "layer"]
    measured.clear()
    record.main([str(tmp_path), "--trial", "--note", "again", "--only", "router-*", "--only", "layer-K"])
    again = read_lines(target)
    assert measured == ["router", "layer"]
    assert {(line.subject, line.shape) for line in again} == {(line.subject, line.shape) for line in first}
    assert {line.subject + line.grows for line in again if line.run.note == "again"} == {"router", "layerK"}
    record.main([str(tmp_path), "--trial", "--note", "last"])
    assert {line.run.note for line in read_lines(target)} == {"last"}
    with pytest.raises(ConfigError, match=r"no part like 'layer-X'(.|\n)*layer-tiny"):
        record.main([str(tmp_path), "--trial", "--only", "layer-X"])
