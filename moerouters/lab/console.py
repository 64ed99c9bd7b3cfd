"""What a comparison shows in a terminal: progress, one line per finished run, a table at the end."""

from __future__ import annotations

from types import TracebackType

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from moerouters.lab.history import History
from moerouters.lab.results import Results, RunResult
from moerouters.lab.roster import Entrant
from moerouters.lab.summary import COLUMNS, summarize
from moerouters.metrics import max_violation


def progress_of_runs(console: Console, *columns: ProgressColumn, shown: bool = True) -> Progress:
    """A line for the run in training, with its `state`, on a terminal alone; it goes when the run ends."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        *columns,
        console=console,
        disable=not (shown and console.is_terminal),
        transient=True,
    )


class ConsoleProgress:
    """A comparison's listener. `shown` False keeps it silent, for all ranks but the first."""

    def __init__(self, console: Console, *, steps: int, shown: bool = True) -> None:
        self._console = console
        self._steps = steps
        self._shown = shown
        self._task: TaskID | None = None
        self._progress = progress_of_runs(console, TimeElapsedColumn(), shown=shown)

    def __enter__(self) -> ConsoleProgress:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def run_started(self, entrant: Entrant, seed: int, *, step: int) -> None:
        name = f"{entrant.label}, seed {seed}"
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(name, total=self._steps, completed=step, state="")
        if step:
            self._say(f"{name}: resumed at step {step}")

    def stepped(self, history: History) -> None:
        assert self._task is not None
        max_vio = float(max_violation(history.loads[-1]).mean())
        state = f"loss {float(history.train_loss[-1]):.3f}  MaxVio {max_vio:.3f}"
        self._progress.update(self._task, completed=len(history), state=state)

    def run_ended(self, result: RunResult) -> None:
        name = f"{result.label}, seed {result.seed}"
        if result.status != "completed":
            cause = f"\n{result.error}" if result.error else ""
            self._say(f"{name}: {result.status} after step {result.steps}{cause}")
            return
        self._say(
            f"{name}: perplexity {result.perplexity:.3f}, AvgMaxVio {result.avg_max_vio:.3f}, "
            f"SupMaxVio {result.sup_max_vio:.3f}, {result.step_ms:.0f} ms a step"
        )

    def _say(self, text: str) -> None:
        if self._shown:
            self._console.print(Text(text))


def print_results(console: Console, results: Results) -> None:
    """The table of a comparison."""
    summaries = summarize(results)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=0)  # nine columns in a narrow terminal
    table.add_column("router", overflow="fold")
    columns = [column for column in COLUMNS if column.terminal]
    for column in columns:
        table.add_column(column.title.replace("Max", " Max").strip().replace(" ", "\n"), justify="right")
    failures = any(summary.status != "completed" for summary in summaries)
    if failures:
        table.add_column("status")
    for summary in summaries:
        cells = [Text("\n".join(summary.parts(column))) for column in columns]
        table.add_row(Text(summary.label), *cells, *([Text(summary.status)] if failures else []))
    console.print(table)
    console.print(Text("In brackets: the worst layer. +- is half the 95% confidence interval over seeds."), style="dim")
