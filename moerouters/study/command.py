"""The command `moerouters study` behind its options: everything is checked, then sized, trained, measured, reported."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from rich.console import Console
from rich.text import Text

from moerouters.errors import ConfigError
from moerouters.lab import corpus as corpora
from moerouters.lab.interrupt import StopRequest
from moerouters.lab.job import choose_device, make_console
from moerouters.lab.ranks import Ranks
from moerouters.lab.report import require_report_extra
from moerouters.registry.configs import field_errors
from moerouters.study.console import ConsoleProgress, print_results
from moerouters.study.plan import Budget, Plan
from moerouters.study.presets import preset
from moerouters.study.report import write_report
from moerouters.study.study import Study


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """What the user typed."""

    preset: str
    models: str | None
    budget: str | None
    seeds: int | None
    rounds: int | None
    tries: int | None
    changes: tuple[str, ...]
    text: Path | None
    threads: int | None
    jobs: int
    device: str
    output: Path
    resume: bool
    overwrite: bool
    measure_again: bool


def run_study(options: StudyOptions) -> int:
    """Do it, and return the exit status: 0, 1 where a run failed, 130 after Ctrl-C (143 after SIGTERM)."""
    require_report_extra()
    plan = plan_of(options)
    device = choose_device(options.device)
    set_threads(options.threads, jobs=options.jobs)
    console = make_console(Ranks())
    study = Study(
        plan=plan,
        corpus=corpora.standard_library() if options.text is None else corpora.from_path(options.text),
        device=device,
        output=options.output,
        resume=options.resume,
        overwrite=options.overwrite,
        measure_again=options.measure_again,
        jobs=options.jobs,
    )
    study.check()
    _introduce(console, study)
    progress = ConsoleProgress(console, options.jobs)
    try:
        with StopRequest() as stop, progress:
            results = study.run(progress, stop)
    except KeyboardInterrupt:  # the second one: leave at once, results.json and the last checkpoint stand
        return 130
    report = write_report(results, options.output)
    print_results(console, results)
    console.print(Text(f"report: {report}"), soft_wrap=True)
    if results.status == "interrupted":
        console.print(Text("interrupted; the same command with --resume continues"))
        return stop.exit_code
    return int(results.status == "failed")


def plan_of(options: StudyOptions) -> Plan:
    """The preset with what the options change. Raises ConfigError for what cannot be."""
    plan = preset(options.preset).selected(options.models).changed(options.changes)
    changes: dict[str, object] = {}
    if options.budget is not None:
        changes["budget"] = Budget.parse(options.budget)
    if options.seeds is not None:
        changes["seeds"] = tuple(range(options.seeds))
    for name in ("rounds", "tries"):
        if getattr(options, name) is not None:
            changes[name] = getattr(options, name)
    try:
        return Plan.model_validate(plan.model_dump() | {name: _plain(value) for name, value in changes.items()})
    except ValidationError as error:
        raise ConfigError("the options of the study are wrong.", why="\n".join(field_errors(error))) from error


def set_threads(threads: int | None, *, jobs: int = 1) -> None:
    """As many as asked for; else what OMP_NUM_THREADS says, else all cores, since that is what training would use, or
    a share of them for each job."""
    if threads is not None:
        torch.set_num_threads(threads)
    elif "OMP_NUM_THREADS" not in os.environ and hasattr(os, "sched_getaffinity"):
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // jobs))


def _plain(value: object) -> object:
    return value.model_dump() if isinstance(value, Budget) else value


def _introduce(console: Console, study: Study) -> None:
    plan, info = study.plan, study.corpus.info
    console.print(Text(f"models: {', '.join(model.name for model in plan.models)}"), soft_wrap=True)
    seeds = ", ".join(map(str, plan.seeds))
    where = f"{study.device}, threads: {torch.get_num_threads()}"
    console.print(Text(f"preset {plan.preset}: {plan.budget}, seeds {seeds}, on {where}"))
    console.print(Text(f"corpus: {info.name}, {info.train_bytes / 1e6:.1f} MB, sha256 {info.sha256[:12]}"))
