"""One model, one seed: from fresh weights, or from a checkpoint, to held-out perplexity."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from moerouters.lab.checkpoint import load_checkpoint, save_checkpoint
from moerouters.lab.files import write_text
from moerouters.lab.run import run_name
from moerouters.lab.train import Trainer
from moerouters.metrics import RunBalance
from moerouters.study.contender import Contender
from moerouters.study.results import TrainingRun


@dataclass(frozen=True)
class Progress:
    """Of a run, after a step."""

    model: str
    seed: int
    step: int
    loss: float
    """Of the last training batch, nats per byte."""


@dataclass(frozen=True)
class Training:
    """A trainer and where its files lie."""

    contender: Contender
    trainer: Trainer
    output: Path

    @property
    def _folder(self) -> Path:
        return self.output / "runs" / run_name(self.contender.spec.name, self.trainer.seed)

    @property
    def _checkpoint(self) -> Path:
        return self._folder / "checkpoint.pt"

    @property
    def _final(self) -> Path:
        return self._folder / "final.pt"

    def _identity(self) -> dict[str, Any]:
        trainer = self.trainer
        return {
            "model": self.contender.spec.model_dump(mode="json"),
            "seed": trainer.seed,
            "settings": trainer.settings.model_dump(exclude={"checkpoint_every"}),
            "corpus": trainer.corpus.info.sha256,
        }

    def resume(self) -> None:
        """Continue from the checkpoint, if there is one. Raises ConfigError if it belongs to another run."""
        if self._checkpoint.exists():
            state = load_checkpoint(self._checkpoint, identity=self._identity(), device=self.trainer.device)
            self.trainer.load_state(state)

    def load_final(self) -> bool:
        """Take the weights of the run's end; False where it has none."""
        if not self._final.exists():
            return False
        self.trainer.load_state(load_checkpoint(self._final, identity=self._identity(), device=self.trainer.device))
        return True

    @property
    def progress(self) -> Progress:
        trainer = self.trainer
        losses = trainer.history.train_loss
        return Progress(
            model=self.contender.spec.name,
            seed=trainer.seed,
            step=trainer.step,
            loss=float(losses[-1]) if len(losses) else math.nan,
        )

    def run(self, *, stepped: Callable[[Progress], None], stopped: Callable[[], bool]) -> TrainingRun:
        """Train to the end, and tell progress after every step. A run that raises is a result too; one that is stopped
        leaves a checkpoint."""
        trainer = self.trainer
        try:
            while trainer.step < trainer.settings.steps:
                if stopped():
                    self._save(self._checkpoint)
                    return self._result("interrupted")
                trainer.train_step()
                stepped(self.progress)
                if trainer.step % trainer.settings.checkpoint_every == 0:
                    self._save(self._checkpoint)
            loss = trainer.validation_loss()
        except Exception as error:
            write_text(self._folder / "error.txt", "".join(traceback.format_exception(error)))
            return self._result("failed", error=f"{type(error).__name__}: {error}")
        self._save(self._final)
        self._checkpoint.unlink(missing_ok=True)
        return self._result("completed", perplexity=math.exp(loss))

    def _save(self, path: Path) -> None:
        save_checkpoint(path, self.trainer.state(), identity=self._identity())

    def _result(
        self,
        status: Literal["completed", "interrupted", "failed"],
        *,
        error: str | None = None,
        perplexity: float | None = None,
    ) -> TrainingRun:
        history = self.trainer.history.tensors()
        steps = len(self.trainer.history)
        last = max(1, steps // 10)
        return TrainingRun(
            model=self.contender.spec.name,
            seed=self.trainer.seed,
            status=status,
            error=error,
            steps=steps,
            perplexity=perplexity,
            train_loss=float(history["train_loss"][-last:].mean()) if steps else None,
            avg_max_vio=_avg_max_vio(history["loads"]) if steps else None,
            seconds=float(history["step_ms"].sum()) / 1e3 if steps else 0.0,
        )


def _avg_max_vio(loads_SLE: torch.Tensor) -> float | None:
    """Mean over layers; None without one."""
    return float(torch.tensor(RunBalance.of(loads_SLE).avg_max_vio).mean()) if loads_SLE.shape[1] else None
