"""The main job: train one model under each router on the same text, and keep what was found at every moment."""

from __future__ import annotations

import gc
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import torch

from moerouters.errors import ConfigError, DispatchError, MoeroutersError, PipelineError
from moerouters.lab.batches import validation_count
from moerouters.lab.corpus import Corpus
from moerouters.lab.determinism import deterministic
from moerouters.lab.files import require_writable
from moerouters.lab.history import History
from moerouters.lab.interrupt import StopRequest
from moerouters.lab.ranks import Ranks
from moerouters.lab.results import Environment, Results, RunResult, SkippedRouter, merge
from moerouters.lab.roster import Entrant
from moerouters.lab.run import Run, run_name
from moerouters.lab.settings import Settings
from moerouters.lab.staged import make_trainer
from moerouters.registry.discovery import host_version


class Listener(Protocol):
    """Who watches a comparison; the command line shows progress with it."""

    def run_started(self, entrant: Entrant, seed: int, *, step: int) -> None:
        """A run begins, at a step other than 0 where it is resumed."""

    def stepped(self, history: History) -> None:
        """The run has finished one more step."""

    def run_ended(self, result: RunResult) -> None:
        """A run is over, whatever its status."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What to do. Every rank of a job makes the same one; only the first writes."""

    entrants: Sequence[Entrant]
    skipped: Sequence[SkippedRouter] = ()
    seeds: Sequence[int]
    preset: str
    settings: Settings
    corpus: Corpus
    device: torch.device
    output: Path
    resume: bool = False
    overwrite: bool = False
    ranks: Ranks = Ranks()  # noqa: RUF009  (frozen)

    def check(self) -> None:
        """Raise ConfigError for whatever would stop the job after it has begun."""
        if self.resume and self.overwrite:
            raise ConfigError(
                "--resume and --overwrite exclude each other.",
                why="one keeps what the other throws away",
                fix="pick one",
            )
        if self.settings.dense_size:
            raise ConfigError(
                "a dense model has no router to compare.",
                where=f"dense_size={self.settings.dense_size}",
                why="every router would train the same model",
                fix="leave it out; `moerouters study` compares dense models with MoE models",
            )
        self.corpus.require(self.settings.sequence_length)
        s = self.settings
        self.ranks.require_divides(s.micro_batch_size)
        windows = validation_count(self.corpus.validation, count=s.validation_sequences, length=s.sequence_length)
        self.ranks.require_even_validation(windows, capacity_factor=s.capacity_factor)
        if not self.ranks.first:
            return
        require_writable(self.output)
        earlier = None if self.overwrite else Results.load(self.output)
        if earlier is None:
            return
        if self.resume:
            merge(earlier, self._empty())
        elif earlier.unfinished:
            raise ConfigError(
                f"'{self.output}' holds a comparison that was interrupted.",
                why="starting again would throw its checkpoints away",
                fix="add --resume to continue it, --overwrite to start again, or pass another --output",
            )

    def run(self, listener: Listener, stop: StopRequest) -> Results:
        """Train every entrant with every seed. Returns what results.json holds too, after every run.

        A run that fails is recorded, and the others go on. A stop request ends the job at the next step, with a
        checkpoint.
        """
        results = self._start()
        finished = {(run.label, run.seed) for run in results.runs if run.status == "completed"}
        # Seeds outside: after the first round there is a whole comparison, further ones narrow its spread.
        todo = [(entrant, seed) for seed in self.seeds for entrant in self.entrants]
        with deterministic():
            for entrant, seed in todo:
                if (entrant.label, seed) in finished:
                    continue
                result = self._one(entrant, seed, listener, stop)
                results = merge(results, self._empty().model_copy(update={"runs": (result,), "status": "running"}))
                self._save(results)
                listener.run_ended(result)
                gc.collect()  # modules and their hooks refer to each other: a GPU has no room for two models
                if result.status == "interrupted":
                    break
        results = results.model_copy(update={"status": _status(results.runs)})
        self._save(results)
        return results

    def _start(self) -> Results:
        earlier = Results.load(self.output) if self.resume else None
        results = self._empty() if earlier is None else merge(earlier, self._empty())
        if self.ranks.first:
            if earlier is None:
                shutil.rmtree(self.output / "runs", ignore_errors=True)
            self._save(results)
        return results

    def _empty(self) -> Results:
        return Results(
            status="running",
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            preset=self.preset,
            settings=self.settings,
            corpus=self.corpus.info,
            environment=environment(self.device, self.settings, self.ranks),
            skipped=tuple(self.skipped),
        )

    def _save(self, results: Results) -> None:
        if self.ranks.first:
            results.save(self.output)

    def _one(self, entrant: Entrant, seed: int, listener: Listener, stop: StopRequest) -> RunResult:
        trainer = make_trainer(
            entrant,
            seed=seed,
            settings=self.settings,
            corpus=self.corpus,
            device=self.device,
            ranks=self.ranks,
        )
        run = Run(trainer, entrant, seed=seed, output=self.output, name=run_name(entrant.label, seed))
        if self.resume:
            run.resume()
        listener.run_started(entrant, seed, step=trainer.step)
        try:
            while trainer.step < self.settings.steps:
                if self._stopped(stop):
                    return run.interrupted()
                trainer.train_step()
                listener.stepped(trainer.history)
                if trainer.step % self.settings.checkpoint_every == 0:
                    run.checkpoint()
            validation = trainer.validate()
            self.ranks.require_same_state(trainer.model)
        except Exception as error:
            # Another rank may not have failed, and would wait for this one for ever: let the launcher end them all.
            # Only what all ranks find out alike - routers, losses - is a result; a failed exchange is not.
            own = isinstance(error, MoeroutersError) and not isinstance(error, DispatchError | PipelineError)
            if self.ranks.size > 1 and not own:
                raise
            return run.failed(error)
        return run.completed(validation)

    def _stopped(self, stop: StopRequest) -> bool:
        """Whether any rank was asked to stop: they have to leave the loop at the same step."""
        wish = torch.tensor(float(stop.signal is not None), device=self.device)
        return bool(self.ranks.sum(wish) > 0)


def _status(runs: Sequence[RunResult]) -> str:
    """Of the whole comparison: that of its worst run."""
    statuses = {run.status for run in runs}
    return next((status for status in ("interrupted", "failed") if status in statuses), "completed")


def environment(device: torch.device, settings: Settings, ranks: Ranks) -> Environment:
    """Where this process runs."""
    on_gpu = device.type == "cuda"
    return Environment(
        moerouters=host_version(),
        torch=torch.__version__,
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        device=torch.cuda.get_device_name(device) if on_gpu else "cpu",
        threads=torch.get_num_threads(),
        ranks=ranks.size,
        expert_parallel=1 if ranks.experts is None else ranks.experts.size,
        dispatcher=None if ranks.experts is None else ranks.experts.label,
        pipeline=1 if ranks.pipeline is None else ranks.pipeline.size,
        schedule=None if ranks.pipeline is None else ranks.pipeline.schedule.name,
        autocast="bfloat16" if on_gpu and settings.bf16 else None,
    )
