"""The main job: train one model under each router on the same text, and keep what was found at every moment."""

from __future__ import annotations

import platform
import re
import shutil
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Protocol

import torch

from moerouters.errors import ConfigError, MoeroutersError
from moerouters.lab.checkpoint import load_checkpoint, save_checkpoint
from moerouters.lab.corpus import Corpus
from moerouters.lab.files import atomic_path, require_writable, write_text
from moerouters.lab.history import History
from moerouters.lab.interrupt import StopRequest
from moerouters.lab.measure import measure
from moerouters.lab.ranks import Ranks
from moerouters.lab.results import Environment, Results, RunResult, SkippedRouter, merge
from moerouters.lab.roster import Entrant, Skipped
from moerouters.lab.settings import Settings
from moerouters.lab.train import Trainer, deterministic
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
    skipped: Sequence[Skipped] = ()
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
        self.corpus.require(self.settings.sequence_length)
        self.ranks.require_divides(self.settings.micro_batch_size)
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
                if result.status == "interrupted":
                    break
        statuses = {run.status for run in results.runs}
        for status in ("interrupted", "failed", "completed"):
            if status in statuses:
                results = results.model_copy(update={"status": status})
                break
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
            skipped=tuple(SkippedRouter(label=item.label, reason=item.reason) for item in self.skipped),
        )

    def _save(self, results: Results) -> None:
        if self.ranks.first:
            results.save(self.output)

    def _one(self, entrant: Entrant, seed: int, listener: Listener, stop: StopRequest) -> RunResult:
        folder = self.output / "runs" / run_name(entrant.label, seed)
        trainer = Trainer(
            entrant,
            seed=seed,
            settings=self.settings,
            corpus=self.corpus,
            device=self.device,
            ranks=self.ranks,
        )
        run = _Run(self, entrant, seed, trainer, folder)
        run.resume()
        listener.run_started(entrant, seed, step=trainer.step)
        try:
            while trainer.step < self.settings.steps:
                if self._stopped(stop):
                    run.checkpoint()
                    return run.result("interrupted")
                trainer.train_step()
                listener.stepped(trainer.history)
                if trainer.step % self.settings.checkpoint_every == 0:
                    run.checkpoint()
            loss = trainer.validation_loss()
            self.ranks.require_same_state(trainer.model)
        except Exception as error:
            # Another rank may not have failed, and would wait for this one for ever: let the launcher end them all.
            if self.ranks.size > 1 and not isinstance(error, MoeroutersError):
                raise
            return run.failed(error)
        return run.result("completed", validation_loss=loss)

    def _stopped(self, stop: StopRequest) -> bool:
        """Whether any rank was asked to stop: they have to leave the loop at the same step."""
        wish = torch.tensor(float(stop.signal is not None), device=self.device)
        return bool(self.ranks.sum(wish) > 0)


@dataclass(frozen=True)
class _Run:
    """The files of one run."""

    comparison: Comparison
    entrant: Entrant
    seed: int
    trainer: Trainer
    folder: Path

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def _identity(self) -> dict[str, object]:
        job = self.comparison
        return {
            "router": self.entrant.name,
            "config": self.entrant.overrides,
            "seed": self.seed,
            "settings": job.settings.model_dump(exclude={"checkpoint_every"}),
            "corpus": job.corpus.info.sha256,
            "ranks": job.ranks.size,
        }

    def resume(self) -> None:
        """Continue from the run's checkpoint, if resuming is wanted and there is one."""
        if self.comparison.resume and self._checkpoint.exists():
            device = self.comparison.device
            self.trainer.load_state(load_checkpoint(self._checkpoint, identity=self._identity(), device=device))

    def checkpoint(self) -> None:
        """Write where the run stands."""
        if self.comparison.ranks.first:
            save_checkpoint(self._checkpoint, self.trainer.state(), identity=self._identity())

    def failed(self, error: Exception) -> RunResult:
        """The record of a run that raised; the traceback goes into a file beside its history."""
        if self.comparison.ranks.first:
            write_text(self.folder / "error.txt", "".join(traceback.format_exception(error)))
        return self.result("failed", error=f"{type(error).__name__}: {error}")

    def result(self, status: str, *, validation_loss: float | None = None, error: str | None = None) -> RunResult:
        """Write the history, drop a checkpoint that nobody needs any more, and return the record."""
        history = self.trainer.history
        file = self.folder / "history.safetensors"
        if self.comparison.ranks.first:
            if len(history):
                with atomic_path(file) as partial:
                    history.save(partial)
            if status == "completed":
                self._checkpoint.unlink(missing_ok=True)
        return measure(
            self.entrant,
            history,
            seed=self.seed,
            status=status,  # type: ignore[arg-type]
            parameters=sum(parameter.numel() for parameter in self.trainer.model.parameters()),
            validation_loss=validation_loss,
            error=error,
            history_file=file.relative_to(self.comparison.output).as_posix() if len(history) else None,
        )


def run_name(label: str, seed: int) -> str:
    """A folder name for a run: readable, and different for different labels."""
    readable = re.sub(r"[^A-Za-z0-9.-]+", "-", label).strip("-.")
    unique = "" if readable == label else "-" + sha256(label.encode()).hexdigest()[:6]
    return f"{readable}{unique}-seed{seed}"


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
        autocast="bfloat16" if on_gpu and settings.bf16 else None,
    )
