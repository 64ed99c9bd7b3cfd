"""What a study shows in a terminal: progress with the time that is left, a line per result, a table at the end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import TaskID
from rich.table import Table
from rich.text import Text

from moerouters.lab.console import progress_of_runs
from moerouters.study.answer import answer
from moerouters.study.results import ModelResult, StudyResults, TrainingRun
from moerouters.study.study import Pending
from moerouters.study.table import COLUMNS, cells
from moerouters.study.training import Progress


class TimeLeft:
    """Seconds until all runs are trained, so many at once: what sizes were timed at, times how that has held up until
    now."""

    def __init__(self, pending: Sequence[Pending], jobs: int = 1) -> None:
        self._jobs = jobs
        self._seconds = {(model.name, seed): model.settings.steps * model.step_s for model, seed in pending}
        self._expected = 0.0
        self._spent = 0.0

    def stepped(self, model: ModelResult, seed: int, *, steps_left: int, seconds: float) -> None:
        """One more step took `seconds`."""
        self._seconds[model.name, seed] = steps_left * model.step_s
        self._expected += model.step_s
        self._spent += seconds

    def __str__(self) -> str:
        pace = self._spent / self._expected if self._expected else 1.0
        longest = max(self._seconds.values(), default=0.0)
        left = max(sum(self._seconds.values()) / self._jobs, longest) * pace
        return f"about {left / 60:.0f} min left" if left >= 90 else f"about {left:.0f} s left"


@dataclass
class _Running:
    task: TaskID
    last: float
    """When its last step ended, on the monotonic clock."""


class ConsoleProgress:
    """A study's listener."""

    def __init__(self, console: Console, jobs: int = 1) -> None:
        self._console = console
        self._jobs = jobs
        self._left = TimeLeft(())
        self._models: dict[str, ModelResult] = {}
        self._running: dict[tuple[str, int], _Running] = {}
        self._progress = progress_of_runs(console)

    def __enter__(self) -> ConsoleProgress:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def sized(self, model: ModelResult) -> None:
        size = f"{model.active_parameters:,} of {model.parameters:,} parameters active"
        if model.match is None:
            self._say(f"{model.name}: {1e3 * model.step_s:.3g} ms a step, {size}")
            return
        ratio, match = model.match.ratio, model.match
        told = f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f}) of {model.partner}'s step"
        self._say(f"{model.name}: {match.knob} {match.value}, {told}, {size}")
        if match.why is not None:
            self._say(f"{model.name}: NO MATCH: {match.why}")

    def planned(self, pending: Sequence[Pending]) -> None:
        self._left = TimeLeft(pending, self._jobs)
        self._models = {model.name: model for model, _ in pending}
        if pending:
            self._say(f"{len(pending)} runs to train, {self._left}")

    def stepped(self, progress: Progress) -> None:
        model, run = self._models[progress.model], (progress.model, progress.seed)
        now = time.monotonic()
        if run not in self._running:
            name = f"{progress.model}, seed {progress.seed}"
            task = self._progress.add_task(name, total=model.settings.steps, completed=progress.step, state="")
            self._running[run] = _Running(task, now)
            if progress.step:
                self._say(f"{name}: resumed at step {progress.step}")
            return
        running = self._running[run]
        left = model.settings.steps - progress.step
        self._left.stepped(model, progress.seed, steps_left=left, seconds=now - running.last)
        running.last = now
        self._progress.update(running.task, completed=progress.step, state=f"loss {progress.loss:.3f}  {self._left}")

    def run_ended(self, run: TrainingRun) -> None:
        running = self._running.pop((run.model, run.seed), None)
        if running is not None:
            self._progress.remove_task(running.task)
        name = f"{run.model}, seed {run.seed}"
        if run.perplexity is None:
            self._say(f"{name}: {run.status} after step {run.steps}" + (f"\n{run.error}" if run.error else ""))
            return
        self._say(f"{name}: perplexity {run.perplexity:.3f} after {run.steps} steps, {run.seconds:.0f} s; {self._left}")

    def measuring(self, what: str) -> None:
        self._say(f"measuring {what}")

    def _say(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)


def print_results(console: Console, results: StudyResults) -> None:
    """The table, and the answer."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    for index, column in enumerate(COLUMNS):
        table.add_column(column.title, justify="left" if index == 0 else "right", overflow="fold")
    for model in results.models:
        table.add_row(*(Text(cell) for cell in cells(results, model)))
    console.print(table)
    for model in results.models:
        if model.anatomy_failed is not None:
            console.print(Text(f"no anatomy of {model.name}: {model.anatomy_failed}"), style="yellow", soft_wrap=True)
    console.print(Text(answer(results)), style="bold", soft_wrap=True)
