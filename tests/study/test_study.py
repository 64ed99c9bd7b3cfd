"""A whole study on a few bytes: sized, trained, measured, stopped and resumed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moerouters.bench.timing import Ratio
from moerouters.errors import ConfigError, StudyError
from moerouters.lab.interrupt import StopRequest
from moerouters.lab.train import Trainer
from moerouters.study import study as job
from moerouters.study.console import TimeLeft
from moerouters.study.plan import Plan
from moerouters.study.report import write_report
from moerouters.study.results import ModelResult, StudyResults, TrainingRun
from moerouters.study.study import Study
from moerouters.study.training import Progress
from moerouters.study.workers import side_by_side
from support.lab import small_corpus
from support.study import CPU, PLAN, SHARED, model, written


class Watcher:
    """Remembers what it is told, and may act at a step."""

    def __init__(self, at_step: Callable[[Progress], None] = lambda progress: None) -> None:
        self.told: list[Any] = []
        self._at_step = at_step

    def sized(self, model: ModelResult) -> None:
        self.told.append(("sized", model.name))

    def planned(self, pending: Any) -> None:
        self.told.append(("planned", [(model.name, seed) for model, seed in pending]))

    def stepped(self, progress: Progress) -> None:
        if not any(each[:3] == ("began", progress.model, progress.seed) for each in self.told):
            self.told.append(("began", progress.model, progress.seed, progress.step))
        self._at_step(progress)

    def run_ended(self, run: TrainingRun) -> None:
        self.told.append(("ended", run.model, run.status))

    def measuring(self, what: str) -> None:
        self.told.append(("measuring", what))


def study(folder: Path, plan: Plan = PLAN, **more: Any) -> Study:
    corpus = small_corpus(Path(tempfile.mkdtemp(dir=folder)))  # each time the same text
    return Study(plan=plan, corpus=corpus, device=CPU, output=folder / "out", **more)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StudyResults, Watcher]:
    folder = tmp_path_factory.mktemp("study")
    watcher = Watcher()
    made = study(folder)
    made.check()
    return folder, made.run(watcher, StopRequest()), watcher


def test_everything_is_measured(whole: tuple[Path, StudyResults, Watcher]) -> None:
    _, found, watcher = whole
    assert found.status == "completed"
    assert [model.name for model in found.models] == ["dense", "topk"]
    dense, topk = found.models
    assert dense.match is None and topk.match is not None
    assert topk.settings.expert_size == topk.match.value and topk.match.tries[0].value == 8  # 16 wide, 2 experts
    assert dense.active_parameters == dense.parameters
    idle = 2 * 2 * 3 * 16 * topk.settings.expert_size  # layers, idle experts, matrices, D, F
    assert topk.active_parameters == topk.parameters - idle
    for row in found.models:
        steps = 0.05 * row.active_parameters / row.settings.batch_tokens
        assert row.settings.steps == max(1, round(steps))
        assert row.step is not None and row.inference is not None
        assert row.anatomy is not None or row.anatomy_failed is not None
        (run,) = found.runs_of(row.name).values()
        assert run.steps == row.settings.steps and run.perplexity is not None
    assert topk.step is not None and topk.step.over_partner is not None
    assert topk.inference is not None and topk.inference.peer == "dense"
    assert watcher.told[0] == ("sized", "dense")
    assert ("planned", [("dense", 0), ("topk", 0)]) in watcher.told


def test_it_is_on_disk_and_in_a_report(whole: tuple[Path, StudyResults, Watcher]) -> None:
    folder, found, _ = whole
    assert StudyResults.load(folder / "out") == found
    page = write_report(found, folder / "out").read_text(encoding="utf-8")
    assert '<p class="answer">' in page and "one seed: no interval" in page
    assert "http" not in page.replace("http-equiv", "")
    assert (folder / "out" / "pictures" / "frontier.png").stat().st_size > 1000


def test_a_completed_study_is_not_trained_again(whole: tuple[Path, StudyResults, Watcher]) -> None:
    folder, found, _ = whole
    watcher = Watcher()
    again = study(folder, resume=True)
    again.check()
    assert again.run(watcher, StopRequest()) == found
    assert watcher.told == [("planned", [])]


def test_a_completed_study_can_be_measured_again(whole: tuple[Path, StudyResults, Watcher], tmp_path: Path) -> None:
    folder, found, _ = whole
    shutil.copytree(folder / "out", tmp_path / "out")  # the other tests see the first measurements
    watcher = Watcher()
    again = study(tmp_path, resume=True, measure_again=True)
    again.check()
    anew = again.run(watcher, StopRequest())
    assert [what for what, *_ in watcher.told] == ["planned", *["measuring"] * 4]  # inference, steps, two anatomies
    assert anew.runs == found.runs and StudyResults.load(tmp_path / "out") == anew
    for before, after in zip(found.models, anew.models, strict=True):
        assert after.unmeasured() == before.unmeasured()
        assert after.step is not None and after.step != before.step
        assert after.inference is not None and after.inference != before.inference
        assert after.anatomy is not None and after.anatomy != before.anatomy
    with pytest.raises(ConfigError, match=r"--measure-again is for a study that is resumed(.|\n)*add --resume"):
        study(tmp_path, measure_again=True).check()


def test_another_plan_or_text_cannot_resume(whole: tuple[Path, StudyResults, Watcher], tmp_path: Path) -> None:
    folder, _, _ = whole
    other = PLAN.model_copy(update={"seeds": (1,), "rounds": 6})
    with pytest.raises(ConfigError, match=r"seeds: \(0,\) there, \(1,\) here\n +rounds: 5 there, 6 here"):
        study(folder, other, resume=True).check()
    fewer = PLAN.model_copy(update={"models": PLAN.models[:1]})
    with pytest.raises(ConfigError, match="models: "):
        study(folder, fewer, resume=True).check()
    more = PLAN.model_copy(update={"seeds": (0, 1), "models": (*PLAN.models, SHARED)})
    study(folder, more, resume=True).check()
    (tmp_path / "words.txt").write_text("other words " * 500, encoding="utf-8")
    from moerouters.lab.corpus import from_path

    strange = Study(plan=PLAN, corpus=from_path(tmp_path), device=CPU, output=folder / "out", resume=True)
    with pytest.raises(ConfigError, match="begun on other text"):
        strange.check()
    with pytest.raises(ConfigError, match="exclude each other"):
        study(folder, resume=True, overwrite=True).check()


def test_stopped_and_resumed_it_trains_the_same_models(
    whole: tuple[Path, StudyResults, Watcher], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, found, _ = whole
    match = found.models[1].match
    # Both studies get the size that the first one found: which one matches is up to the machine.
    monkeypatch.setattr(job.Search, "run", lambda search, measure: match)
    monkeypatch.setattr(job, "dissected", lambda trainer: (None, "not now"))
    stop = StopRequest()

    def press(progress: Progress) -> None:
        if (progress.model, progress.step) == ("topk", 2):
            stop.signal = 2

    first = study(tmp_path)
    first.check()
    halted = first.run(Watcher(press), stop)
    assert [(run.model, run.status) for run in halted.runs] == [("dense", "completed"), ("topk", "interrupted")]
    assert halted.status == "interrupted" and halted.unfinished
    with pytest.raises(ConfigError, match="add --resume to continue"):
        study(tmp_path).check()
    watcher = Watcher()
    resumed = study(tmp_path, resume=True).run(watcher, StopRequest())
    assert ("began", "topk", 0, 2) in watcher.told
    assert resumed.status == "completed"
    for name in ("dense", "topk"):
        assert resumed.runs_of(name)[0].perplexity == found.runs_of(name)[0].perplexity


@pytest.mark.slow
def test_side_by_side_it_trains_the_same_models(
    whole: tuple[Path, StudyResults, Watcher], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped once: what a process was at is gone on with from its checkpoint."""
    _, found, _ = whole
    monkeypatch.setattr(job.Study, "_measure", lambda study, results, listener, stop: results)
    found.model_copy(update={"runs": (), "status": "interrupted"}).save(tmp_path / "out")
    stop, told = StopRequest(), set()

    def press(progress: Progress) -> None:
        told.add(progress.model)
        if len(told) == 2:
            stop.signal = 2

    halted = study(tmp_path, resume=True, jobs=2).run(Watcher(press), stop)
    assert halted.status == "interrupted" and told == {"dense", "topk"}
    assert len(halted.runs) == 2
    watcher = Watcher()
    ended = study(tmp_path, resume=True, jobs=2).run(watcher, StopRequest())
    assert ended.status == "completed"
    for run in halted.runs:
        if run.status == "interrupted":
            assert ("began", run.model, 0, run.steps) in watcher.told
    for name in ("dense", "topk"):
        assert ended.runs_of(name)[0].perplexity == found.runs_of(name)[0].perplexity


def _dies(job: int, report: Any, stopped: Any) -> TrainingRun:
    os._exit(3)


def test_a_process_that_ends_by_itself_ends_the_study() -> None:
    with pytest.raises(StudyError, match=r"a process that trained a model has ended by itself(.|\n)*--resume"):
        list(side_by_side(_dies, [1, 2], processes=1, stepped=lambda told: None, stopped=lambda: False))


def test_several_at_once_are_for_cpus(tmp_path: Path) -> None:
    on_gpu = replace(study(tmp_path, jobs=2), device=torch.device("cuda"))
    with pytest.raises(ConfigError, match="--jobs 2 is for CPUs"):
        on_gpu.check()


def test_a_run_that_fails_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(trainer: Trainer) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(Trainer, "train_step", failing)
    plan = PLAN.model_copy(update={"models": PLAN.models[:1]})
    found = study(tmp_path, plan).run(Watcher(), StopRequest())
    assert (found.status, found.runs[0].error) == ("failed", "RuntimeError: out of luck")
    assert "out of luck" in (tmp_path / "out" / "runs" / "dense-seed0" / "error.txt").read_text(encoding="utf-8")
    assert found.models[0].step is None


def test_time_left_follows_the_pace() -> None:
    row = model("dense", step_s=2.0)  # ten steps
    left = TimeLeft([(row, 0), (row, 1)])
    assert str(left) == "about 40 s left"
    left.stepped(row, 0, steps_left=9, seconds=12.0)
    assert str(left) == "about 4 min left"  # 38 s of steps, at a sixth of the speed
    assert str(TimeLeft([(row, 0), (row, 1), (row, 2)], 2)) == "about 30 s left"
    assert str(TimeLeft([(row, 0), (row, 1)], 8)) == "about 20 s left"  # of one run


def test_damaged_results_are_refused(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot read the results"):
        StudyResults.load(tmp_path)


def test_intervals_survive_the_disk(tmp_path: Path) -> None:
    from support.study import three_seeds

    assert written(tmp_path, three_seeds()) == three_seeds()
    assert isinstance(three_seeds().models[1].match.ratio, Ratio)  # type: ignore[union-attr]
