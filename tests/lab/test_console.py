from io import StringIO
from pathlib import Path

from rich.console import Console

from moerouters.lab.console import ConsoleProgress, print_results
from moerouters.lab.corpus import Corpus
from support.lab import SMALL, Listener, entrant, history_of, run_comparison


def console(*, terminal: bool, width: int = 100) -> tuple[Console, StringIO]:
    file = StringIO()
    return Console(file=file, force_terminal=terminal, width=width, color_system=None), file


def test_progress_shows_loss_and_balance() -> None:
    screen, file = console(terminal=True)
    with ConsoleProgress(screen, steps=9) as progress:
        progress.run_started(entrant(), 0, step=0)
        progress.stepped(history_of(4))
        progress._progress.refresh()  # a terminal is redrawn ten times a second
        progress.run_started(entrant(), 1, step=2)
    assert "loss 1.250" in file.getvalue()
    assert "MaxVio" in file.getvalue()
    assert "4/9" in file.getvalue()
    assert "topk, seed 1: resumed at step 2" in file.getvalue()


def test_without_a_terminal_there_is_a_line_per_run(output: Path, corpus: Corpus) -> None:
    screen, file = console(terminal=False)
    results = run_comparison(output, corpus)
    with ConsoleProgress(screen, steps=SMALL.steps) as progress:
        progress.run_started(entrant(), 0, step=0)
        progress.stepped(history_of(4))
        progress.run_ended(results.runs[0])
        progress.run_ended(results.runs[0].model_copy(update={"status": "failed", "error": "why [not]"}))
        progress.run_ended(results.runs[0].model_copy(update={"status": "interrupted"}))
    lines = file.getvalue().splitlines()
    assert lines[0].startswith(f"topk, seed 0: perplexity {results.runs[0].perplexity:.3f}, AvgMaxVio ")
    assert lines[1:] == [
        "topk, seed 0: failed after step 6",
        "why [not]",
        "topk, seed 0: interrupted after step 6",
    ]


def test_other_ranks_are_silent(output: Path, corpus: Corpus) -> None:
    screen, file = console(terminal=True)
    with ConsoleProgress(screen, steps=6, shown=False) as progress:
        progress.run_started(entrant(), 0, step=3)
        progress.run_ended(run_comparison(output, corpus, listener=Listener()).runs[0])
    assert file.getvalue() == ""


def test_table_is_readable_at_80_columns(output: Path, corpus: Corpus, balanced: None) -> None:
    screen, file = console(terminal=False, width=80)
    results = run_comparison(output, corpus, "topk,balanced", seeds=(0, 1))
    print_results(screen, results)
    table = file.getvalue()
    for word in ("perplexity", "Avg", "Sup", "MaxVio", "MinVio", "micro", "dead", "share", "topk", "balanced", "+-"):
        assert word in table
    assert "\u2026" not in table
    assert "status" not in table
    failed = results.runs[0].model_copy(update={"status": "failed"})
    print_results(screen, results.model_copy(update={"runs": (failed,)}))
    assert "failed" in file.getvalue()
