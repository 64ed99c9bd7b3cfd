"""The commands `moerouters trace` and `moerouters replay` behind their options."""

from __future__ import annotations

from pathlib import Path

from rich.text import Text as Line

from moerouters.inspecting.inspect_command import make_console
from moerouters.inspecting.inspect_console import table
from moerouters.inspecting.logits_trace import About, LogitsTrace
from moerouters.inspecting.offline import default_steps, evaluate
from moerouters.inspecting.offline_report import OfflineReport
from moerouters.inspecting.offline_routers import chosen_routers
from moerouters.inspecting.recording import record_logits
from moerouters.inspecting.sources import quietly, source
from moerouters.inspecting.text import BYTES, read_text, run_over
from moerouters.lab.files import atomic_path, require_writable, write_text
from moerouters.lab.job import choose_device, set_threads


def run_trace(model: str, *, text: Path, output: Path, tokens: int, device: str) -> LogitsTrace:
    """Run the model over the text, write the trace and say what is in it."""
    console = make_console()
    chosen = choose_device(device)
    found = source(model)
    read = read_text(text, found, tokens)
    require_writable(output.parent)
    with quietly():
        opened = found.open(chosen)
        with record_logits(opened.model) as recorder:
            run_over(opened, read)
    about = About(model=found.name, text=read.name, sha256=read.sha256, tokenizer=read.tokenizer)
    trace = recorder.trace(about)
    with atomic_path(output) as partial:
        trace.save(partial)
    for name, reason in recorder.left_out.items():
        console.print(Line(f"{name} is left out: {reason}"), style="yellow")
    if read.tokenizer == BYTES:
        console.print(Line("The model has no tokenizer: bytes modulo the vocabulary were its ids."), style="yellow")
    first = next(iter(trace.layers.values()))
    dtype = str(first.logits_TE.dtype).removeprefix("torch.")
    size = output.stat().st_size / 1e6
    line = f"trace: {output}, {trace.tokens} tokens, {len(trace.layers)} routers, {dtype} logits, {size:.1f} MB"
    console.print(Line(line), soft_wrap=True)
    return trace


def run_replay(path: Path, *, routers: str | None, steps: int | None, device: str, json: Path | None) -> OfflineReport:
    """Evaluate routers on a trace, print the table and write what was asked for."""
    console = make_console()
    chosen = choose_device(device)
    set_threads()
    trace = LogitsTrace.load(path)
    entrants, skipped = chosen_routers(routers, trace)
    for label, reason in skipped.items():
        console.print(Line(f"skipped {label}: {reason}"), style="yellow")
    report = evaluate(trace, entrants, steps=default_steps(trace) if steps is None else steps, device=chosen)
    about = f"{trace.about.model or path.name} on {trace.about.text}" if trace.about.text else path.name
    size = f"{trace.tokens} tokens in {report.steps} steps, {len(trace.layers)} routers of the model"
    console.print(Line(f"{about}: {size}"))
    shown = table(("router", "AvgMaxVio", "SupMaxVio", "last MaxVio", "kept score", "changed", "time"))
    for router in report.routers:
        shown.add_row(
            Line(router.label),
            f"{router.avg_max_vio:.3f}",
            f"{router.sup_max_vio:.3f}",
            f"{router.last_max_vio:.3f}",
            f"{router.kept_score:.4f}",
            f"{router.changed:.1%}",
            f"{router.relative_time:.2f}",
        )
    console.print(shown)
    explained = (
        "MaxVio is the mean over layers. kept score: scores of the chosen over those that plain topk chooses. "
        "changed: part of the choices that topk does not make. time: of a step, over that of topk."
    )
    console.print(Line(explained), style="dim")
    if json is not None:
        write_text(json, report.model_dump_json(indent=2) + "\n")
        console.print(Line(f"JSON: {json}"), soft_wrap=True)
    return report
