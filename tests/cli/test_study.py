"""`moerouters study` as a user types it."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from moerouters.cli import app
from moerouters.lab.interrupt import StopRequest
from moerouters.study.results import StudyResults
from moerouters.study.study import Study
from support.lab import write_text
from support.study import three_seeds

TINY = ("--rounds", "5", "--tries", "1", "--budget", "0.02", "--models", "topk-m", "--threads", "1", "--device", "cpu")
SIZES = {
    "hidden_size": 16, "num_layers": 1, "dense_size": 16, "num_experts": 4, "sequence_length": 32,
    "micro_batch_size": 2, "validation_sequences": 4,
}  # fmt: skip


def study(folder: Path, *more: str, text: Path | None = None) -> object:
    sets = [f"--set={name}={value}" for name, value in SIZES.items()]
    where = ["--text", str(text or write_text(folder)), "--output", str(folder / "out")]
    return CliRunner().invoke(app, ["study", *where, *TINY, *sets, *more])


def test_from_options_to_a_report(tmp_path: Path) -> None:
    done = study(tmp_path)
    assert done.exit_code == 0, done.output  # type: ignore[attr-defined]
    found = StudyResults.load(tmp_path / "out")
    assert found is not None and found.status == "completed"
    assert [model.name for model in found.models] == ["dense-m", "topk-m"]
    output = done.output  # type: ignore[attr-defined]
    for words in ("2 runs to train, about", "topk-m, seed 0: perplexity", "measuring the anatomy of topk-m", "report:"):
        assert words in output
    assert (tmp_path / "out" / "report.html").exists()


def test_ctrl_c_ends_with_a_report_of_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def halted(study: Study, listener: object, stop: StopRequest) -> StudyResults:
        stop.signal = 2
        return three_seeds().model_copy(update={"status": "interrupted"})

    monkeypatch.setattr(Study, "run", halted)
    done = study(tmp_path)
    assert done.exit_code == 130  # type: ignore[attr-defined]
    assert "the same command with --resume continues" in done.output  # type: ignore[attr-defined]
    assert "This study is not finished" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--preset", "tinny"], "did you mean 'tiny'"),
        (["--models", "nobody"], "has no model 'nobody'"),
        (["--budget", "soon"], "cannot read the budget"),
        (["--set", "topk-m.top_k=9"], "top_k"),
        (["--set", "sequence_length=100000"], "a window needs 100001"),
        (["--resume", "--overwrite"], "exclude each other"),
        (["--mesh"], "one rank has no mesh"),
        (["--mesh", "--models", "dense-s"], "there is no MoE model to spread"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_trained(tmp_path: Path, options: list[str], words: str) -> None:
    where = ["--text", str(write_text(tmp_path)), "--output", str(tmp_path / "out"), "--device", "cpu"]
    done = CliRunner().invoke(app, ["study", *where, *options])
    assert done.exit_code == 2
    assert words in done.output
    assert not (tmp_path / "out" / "results.json").exists()
