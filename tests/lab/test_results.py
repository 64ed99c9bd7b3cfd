from pathlib import Path
from typing import Any

import pytest

from moerouters.errors import ConfigError
from moerouters.lab.compare import environment
from moerouters.lab.corpus import Corpus
from moerouters.lab.history import History
from moerouters.lab.measure import measure
from moerouters.lab.ranks import Ranks
from moerouters.lab.results import Results, RunResult, SkippedRouter, merge
from moerouters.lab.train import Validation
from support.lab import CPU, SMALL, entrant, history_of


def run(seed: int = 0, *, steps: int = 3) -> RunResult:
    history = history_of(steps) if steps else History()
    return measure(
        entrant(), history, seed=seed, status="completed", parameters=1, validation=Validation(loss=1.0, max_vio=0.1)
    )


def results(text: Corpus, *runs: RunResult, **changes: Any) -> Results:
    base = Results(
        status="completed",
        started="2026-01-01T00:00:00+00:00",
        preset="tiny",
        settings=SMALL,
        corpus=text.info,
        environment=environment(CPU, SMALL, Ranks()),
        runs=runs,
    )
    return base.model_copy(update=changes)


def test_round_trip(corpus: Corpus, tmp_path: Path) -> None:
    written = results(corpus, run(), run(1, steps=0), skipped=(SkippedRouter(label="x", reason="why"),))
    written.save(tmp_path)
    assert Results.load(tmp_path) == written


def test_no_results(tmp_path: Path) -> None:
    assert Results.load(tmp_path) is None


def test_another_schema_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    results(corpus).save(tmp_path)
    path = tmp_path / "results.json"
    path.write_text(path.read_text("utf-8").replace('"schema_version": 1', '"schema_version": 2'), "utf-8")
    with pytest.raises(ConfigError, match="schema_version: input should be 1"):
        Results.load(tmp_path)


def test_results_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "results.json").mkdir()
    with pytest.raises(ConfigError, match="Is a directory"):
        Results.load(tmp_path)


def test_other_text_is_never_compared(corpus: Corpus) -> None:
    other = results(corpus, corpus=corpus.info.model_copy(update={"sha256": "0" * 64}))
    with pytest.raises(ConfigError, match=f"not comparable(?s:.)*{corpus.info.sha256}(?s:.)*{'0' * 64}"):
        merge(results(corpus), other)


def test_other_settings_are_never_compared(corpus: Corpus) -> None:
    other = results(corpus, settings=SMALL.override({"steps": 9}))
    with pytest.raises(ConfigError, match="steps: 6 and 9"):
        merge(results(corpus), other)


def test_checkpoint_interval_may_differ(corpus: Corpus) -> None:
    other = results(corpus, settings=SMALL.override({"checkpoint_every": 1}))
    assert merge(results(corpus), other).settings.checkpoint_every == 1


def test_merge_keeps_all_runs_and_the_newer_of_two(corpus: Corpus) -> None:
    first = results(corpus, run(0), run(1), skipped=(SkippedRouter(label="topk", reason="a"),), started="earlier")
    second = results(corpus, run(1, steps=5), run(2), skipped=(SkippedRouter(label="x", reason="b"),), status="failed")
    merged = merge(first, second)
    assert [(item.seed, item.steps) for item in merged.runs] == [(0, 3), (1, 5), (2, 3)]
    assert [item.label for item in merged.skipped] == ["x"]
    assert (merged.started, merged.status) == ("earlier", "failed")


@pytest.mark.parametrize(
    ("status", "unfinished"), [("running", True), ("interrupted", True), ("failed", False), ("completed", False)]
)
def test_unfinished(corpus: Corpus, status: str, unfinished: bool) -> None:
    assert results(corpus, status=status).unfinished is unfinished
