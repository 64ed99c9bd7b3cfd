"""The main job: sizes, training, and what is measured of the trained models; kept on disk at every moment."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import torch

from moerouters.bench.timing import Ratio, median_of, ratio_of
from moerouters.errors import ConfigError
from moerouters.lab.compare import environment
from moerouters.lab.corpus import Corpus
from moerouters.lab.determinism import deterministic
from moerouters.lab.files import require_writable
from moerouters.lab.interrupt import StopRequest
from moerouters.lab.ranks import Ranks
from moerouters.lab.train import Trainer
from moerouters.study.anatomy import dissected
from moerouters.study.answer import perplexity_of
from moerouters.study.contender import Contender
from moerouters.study.inference import time_inference
from moerouters.study.matching import Match, Search
from moerouters.study.plan import ModelSpec, Plan
from moerouters.study.results import ModelResult, Step, StudyResults, TrainingRun, require_same
from moerouters.study.timing import time_steps
from moerouters.study.training import Progress, Training
from moerouters.study.workers import side_by_side

Pending = tuple[ModelResult, int]
"""A model and a seed that are still to be trained."""


class Listener(Protocol):
    """Who watches a study; the command line shows progress with it."""

    def sized(self, model: ModelResult) -> None:
        """A model has got its size."""

    def planned(self, pending: Sequence[Pending]) -> None:
        """All sizes stand, and these runs are to come."""

    def stepped(self, progress: Progress) -> None:
        """A run begins, at a step other than 0 where it is resumed; or it has finished one more step."""

    def run_ended(self, run: TrainingRun) -> None:
        """A run is over, whatever its status."""

    def measuring(self, what: str) -> None:
        """Something of the trained models is about to be measured."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """What to do, and where."""

    plan: Plan
    corpus: Corpus
    device: torch.device
    output: Path
    resume: bool = False
    overwrite: bool = False
    measure_again: bool = False
    """Of a study that is resumed, measure the trained models anew: steps, anatomy and inference."""
    jobs: int = 1
    """Runs that train at once, each in a process of its own. Everything that is timed is timed alone."""

    def check(self) -> None:
        """Raise for whatever would stop the study after it has begun."""
        if self.resume and self.overwrite:
            raise ConfigError("--resume and --overwrite exclude each other.", fix="pick one")
        if self.measure_again and not self.resume:
            raise ConfigError(
                "--measure-again is for a study that is resumed.",
                why="a new study measures its models anyway",
                fix="add --resume, or leave it out",
            )
        if self.jobs > 1 and self.device.type != "cpu":
            raise ConfigError(
                f"--jobs {self.jobs} is for CPUs.",
                where=f"--device {self.device}",
                why="several processes on one device take its memory from each other, and are no faster",
                fix="leave out --jobs",
            )
        for spec in self.plan.models:
            self.corpus.require(Contender.of(self.plan, spec).settings.sequence_length)
        require_writable(self.output)
        earlier = None if self.overwrite else StudyResults.load(self.output)
        if earlier is None:
            return
        if self.resume:
            require_same(earlier, self.plan, self.corpus.info)
        elif earlier.unfinished:
            raise ConfigError(
                f"'{self.output}' holds a study that was interrupted.",
                why="starting again would throw its checkpoints away",
                fix="add --resume to continue it, --overwrite to start again, or pass another --output",
            )

    def run(self, listener: Listener, stop: StopRequest) -> StudyResults:
        """Everything that is not in results.json yet. A stop request ends it at the next step or measurement."""
        results = self._start()
        with deterministic():
            results = self._size(results, listener, stop)
            if stop.signal is None:
                results = self._train(results, listener, stop)
            if stop.signal is None:
                results = self._measure(results, listener, stop)
        failed = any(run.status == "failed" for run in results.runs)
        status = "interrupted" if stop.signal is not None else "failed" if failed else "completed"
        return self._kept(results.model_copy(update={"status": status}))

    def _start(self) -> StudyResults:
        earlier = StudyResults.load(self.output) if self.resume else None
        if earlier is not None:
            models = tuple(each.unmeasured() for each in earlier.models) if self.measure_again else earlier.models
            return self._kept(earlier.model_copy(update={"status": "running", "plan": self.plan, "models": models}))
        shutil.rmtree(self.output / "runs", ignore_errors=True)
        return self._kept(
            StudyResults(
                status="running",
                started=datetime.now(UTC).isoformat(timespec="seconds"),
                plan=self.plan,
                corpus=self.corpus.info,
                environment=environment(self.device, self.plan.settings, Ranks()),
            )
        )

    def _kept(self, results: StudyResults) -> StudyResults:
        results.save(self.output)
        return results

    def _size(self, results: StudyResults, listener: Listener, stop: StopRequest) -> StudyResults:
        """Dense models first, whose step time the others are to have."""
        for spec in sorted(self.plan.models, key=lambda spec: spec.partner is not None):
            if results.model(spec.name) is not None:
                continue
            if stop.signal is not None:
                break
            model = self._dense(spec) if spec.partner is None else self._matched(spec, results)
            results = self._kept(results.with_model(model))
            listener.sized(model)
            gc.collect()
        return results

    def _dense(self, spec: ModelSpec) -> ModelResult:
        contender = Contender.of(self.plan, spec)
        trainer = self._trainer(contender, seed=self.plan.seeds[0])
        taken = time_steps({spec.name: trainer}, device=self.device, rounds=self.plan.rounds)
        return self._model(contender, trainer, step_s=median_of(taken[spec.name]).value, match=None)

    def _matched(self, spec: ModelSpec, results: StudyResults) -> ModelResult:
        """The size at which a step lasts as long as the partner's."""
        partner = _of(results, spec.partner)
        start, seed = Contender.of(self.plan, spec), self.plan.seeds[0]
        theirs = self._trainer(Contender.of(self.plan, self.plan.model(partner.name)), seed=seed)
        current: dict[int, Trainer] = {}

        def measure(value: int, rounds: int) -> Ratio:
            if value not in current:
                current.clear()
                current[value] = self._trainer(start.sized(value), seed=seed)
            trainers = {partner.name: theirs, spec.name: current[value]}
            taken = time_steps(trainers, device=self.device, rounds=rounds)
            return ratio_of(taken[spec.name], taken[partner.name])

        widths = spec.knob == "expert_size"
        search = Search(
            knob=spec.knob,
            start=getattr(start.settings, spec.knob),
            multiple=self.plan.multiple if widths else 1,
            lowest=self.plan.multiple if widths else 1,
            rounds=self.plan.rounds,
            tries=self.plan.tries,
            band=self.plan.band,
        )
        match = search.run(measure)
        contender = start.sized(match.value)
        trainer = self._trainer(contender, seed=seed)
        return self._model(contender, trainer, step_s=partner.step_s * match.ratio.value, match=match)

    def _model(self, contender: Contender, trainer: Trainer, *, step_s: float, match: Match | None) -> ModelResult:
        active = contender.active_parameters(trainer)
        batch = contender.settings.batch_tokens
        steps = self.plan.budget.steps(active_parameters=active, batch_tokens=batch, step_s=step_s)
        warmup = min(contender.settings.warmup_steps, steps // 4)
        spec = contender.spec
        return ModelResult(
            name=spec.name,
            router=spec.router,
            partner=spec.partner,
            settings=contender.settings.override({"steps": steps, "warmup_steps": warmup}),
            parameters=trainer.num_parameters,
            active_parameters=active,
            match=match,
            step_s=step_s,
        )

    def _train(self, results: StudyResults, listener: Listener, stop: StopRequest) -> StudyResults:
        """Seeds outside: after the first round there is a whole study, further ones narrow its intervals."""
        pending = [
            (model, seed)
            for seed in self.plan.seeds
            for model in results.models
            if seed not in results.runs_of(model.name)
        ]
        listener.planned(pending)
        for run in self._runs(pending, listener.stepped, lambda: stop.signal is not None):
            results = self._kept(results.with_run(run))
            listener.run_ended(run)
        return results

    def _runs(
        self, pending: Sequence[Pending], stepped: Callable[[Progress], None], stopped: Callable[[], bool]
    ) -> Iterator[TrainingRun]:
        """In turn, or several at once; after a stop no others begin."""
        if self.jobs > 1:
            yield from side_by_side(self.train, pending, processes=self.jobs, stepped=stepped, stopped=stopped)
            return
        for each in pending:
            if stopped():
                return
            yield self.train(each, stepped, stopped)

    def train(self, run: Pending, stepped: Callable[[Progress], None], stopped: Callable[[], bool]) -> TrainingRun:
        """One run, from its checkpoint if it has one."""
        training = self._training(*run)
        training.resume()
        stepped(training.progress)
        with deterministic():  # in a process of its own nobody else sees to it
            return training.run(stepped=stepped, stopped=stopped)

    def _measure(self, results: StudyResults, listener: Listener, stop: StopRequest) -> StudyResults:
        """Steps in turn, their anatomy, and inference; of the models as the first seed trained them."""
        trained = {model.name: self._training(model, self.plan.seeds[0]) for model in results.models}
        trained = {name: training for name, training in trained.items() if training.load_final()}
        if not trained:
            return results
        trainers = {name: training.trainer for name, training in trained.items()}
        if any(model.inference is None for model in results.models if model.name in trainers):
            listener.measuring("inference")
            perplexities = {name: perplexity_of(results, name) for name in trainers}
            for name, found in time_inference(
                {name: trainer.model for name, trainer in trainers.items()},
                results.models,
                {name: value.value for name, value in perplexities.items() if value is not None},
                device=self.device,
                rounds=self.plan.rounds,
            ).items():
                results = results.with_model(_of(results, name).model_copy(update={"inference": found}))
            results = self._kept(results)
        if stop.signal is None and any(model.step is None for model in results.models if model.name in trainers):
            listener.measuring("training steps of all models in turn")
            results = self._kept(self._timed_again(results, trainers))
        for name, trainer in trainers.items():
            model = _of(results, name)
            if stop.signal is not None or model.anatomy is not None or model.anatomy_failed is not None:
                continue
            listener.measuring(f"the anatomy of {name}")
            anatomy, why = dissected(trainer)
            model = model.model_copy(update={"anatomy": anatomy, "anatomy_failed": why})
            results = self._kept(results.with_model(model))
        return results

    def _timed_again(self, results: StudyResults, trainers: dict[str, Trainer]) -> StudyResults:
        taken = time_steps(trainers, device=self.device, rounds=2 * self.plan.rounds)
        for name, seconds in taken.items():
            model = _of(results, name)
            over = ratio_of(seconds, taken[model.partner]) if model.partner in taken else None
            step = Step(ms=median_of([1e3 * each for each in seconds]), over_partner=over)
            results = results.with_model(model.model_copy(update={"step": step}))
        return results

    def _training(self, model: ModelResult, seed: int) -> Training:
        contender = Contender.of(self.plan, self.plan.model(model.name)).resolved(model.settings)
        return Training(contender, self._trainer(contender, seed=seed), self.output)

    def _trainer(self, contender: Contender, *, seed: int) -> Trainer:
        return contender.trainer(seed=seed, corpus=self.corpus, device=self.device)


def _of(results: StudyResults, name: str | None) -> ModelResult:
    return next(model for model in results.models if model.name == name)
