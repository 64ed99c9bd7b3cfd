"""The files and the record of one run: a trainer, and where its checkpoint and history lie."""

from __future__ import annotations

import re
import traceback
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from moerouters.lab.checkpoint import load_checkpoint, save_checkpoint
from moerouters.lab.files import atomic_path, write_text
from moerouters.lab.measure import measure
from moerouters.lab.results import RunResult
from moerouters.lab.roster import Entrant
from moerouters.lab.train import Trainer, Validation


@dataclass(frozen=True)
class Run:
    """One router, one seed. Every rank has one; only the first writes."""

    trainer: Trainer
    entrant: Entrant
    seed: int
    output: Path
    name: str

    @property
    def folder(self) -> Path:
        """Where its files lie."""
        return self.output / "runs" / self.name

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    @property
    def _writes(self) -> bool:
        return self.trainer.ranks.first

    def _identity(self) -> dict[str, Any]:
        provenance, trainer = self.entrant.provenance, self.trainer
        experts, pipeline = trainer.ranks.experts, trainer.ranks.pipeline
        return {
            "router": self.entrant.name,
            "plugin": f"{provenance.distribution} {provenance.version}",
            "config": self.entrant.overrides,
            "seed": self.seed,
            "settings": trainer.settings.model_dump(exclude={"checkpoint_every"}),
            "corpus": trainer.corpus.info.sha256,
            "ranks": trainer.ranks.size,
            "experts": None if experts is None else f"{experts.label} over {experts.size} ranks",
            "pipeline": None if pipeline is None else pipeline.label,
        }

    def resume(self) -> None:
        """Continue from the run's checkpoint, if there is one. Raises ConfigError if it belongs to another run."""
        if self._checkpoint.exists():
            device = self.trainer.device
            self.trainer.load_state(load_checkpoint(self._checkpoint, identity=self._identity(), device=device))

    def checkpoint(self) -> None:
        """Write where the run stands; a collective, since the state of experts is gathered from their ranks."""
        state = self.trainer.state()
        if self._writes:
            save_checkpoint(self._checkpoint, state, identity=self._identity())

    def completed(self, validation: Validation) -> RunResult:
        """The record of a run that reached its end; it needs no checkpoint any more."""
        result = self._result("completed", validation=validation)
        if self._writes:
            self._checkpoint.unlink(missing_ok=True)
        return result

    def interrupted(self) -> RunResult:
        """The record of a run that was asked to stop, after a checkpoint."""
        self.checkpoint()
        return self._result("interrupted")

    def failed(self, error: Exception) -> RunResult:
        """The record of a run that raised; the traceback goes into a file beside its history."""
        if self._writes:
            write_text(self.folder / "error.txt", "".join(traceback.format_exception(error)))
        return self._result("failed", error=f"{type(error).__name__}: {error}")

    def _result(
        self,
        status: Literal["completed", "interrupted", "failed"],
        *,
        validation: Validation | None = None,
        error: str | None = None,
    ) -> RunResult:
        history, file = self.trainer.history, self.folder / "history.safetensors"
        if self._writes and len(history):
            with atomic_path(file) as partial:
                history.save(partial)
        return measure(
            self.entrant,
            history,
            seed=self.seed,
            status=status,
            parameters=self.trainer.num_parameters,
            validation=validation,
            error=error,
            history_file=file.relative_to(self.output).as_posix() if len(history) else None,
        )


def run_name(label: str, seed: int) -> str:
    """A folder name for a run: readable, and different for different labels."""
    readable = re.sub(r"[^A-Za-z0-9.-]+", "-", label).strip("-.")
    unique = "" if readable == label else "-" + sha256(label.encode()).hexdigest()[:6]
    return f"{readable}{unique}-seed{seed}"
