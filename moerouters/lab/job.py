"""The command `moerouters compare` behind its options: everything is checked, then trained, then reported."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from moerouters.errors import ConfigError
from moerouters.lab import corpus as corpora
from moerouters.lab.compare import Comparison
from moerouters.lab.console import ConsoleProgress, print_results
from moerouters.lab.corpus import Corpus
from moerouters.lab.expert_ranks import expert_ranks
from moerouters.lab.interrupt import StopRequest
from moerouters.lab.overrides import parse_changes
from moerouters.lab.pipeline_ranks import pipeline_ranks, schedule_of
from moerouters.lab.presets import preset
from moerouters.lab.ranks import Ranks, joined_ranks
from moerouters.lab.report import require_report_extra, write_report
from moerouters.lab.roster import default_roster, named_roster
from moerouters.lab.settings import Settings
from moerouters.pipeline.stages import runs

DEFAULT_DISPATCHER = "auto"
DEFAULT_SCHEDULE = "1f1b"


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """What the user typed."""

    routers: str | None
    preset: str
    text: Path | None
    seeds: tuple[int, ...]
    settings: Mapping[str, Any]
    """Of options with a name of their own; they and --set may not disagree."""
    changes: tuple[str, ...]
    expert_parallel: int
    model_parallel: int
    dispatcher: str | None
    """None: the default where experts are spread."""
    pipeline: int
    tensor: int
    schedule: str | None
    """None: the default in a pipeline."""
    device: str
    output: Path
    resume: bool
    overwrite: bool


def run_compare(options: CompareOptions) -> int:
    """Do it, and return the exit status: 0, 1 where a run failed, 130 after Ctrl-C (143 after SIGTERM)."""
    device = choose_device(options.device)
    set_threads()
    with joined_ranks(device) as ranks:
        console = make_console(ranks)
        comparison = prepare(options, device=device, ranks=ranks)
        introduce(console, comparison)
        progress = ConsoleProgress(console, steps=comparison.settings.steps, shown=ranks.first)
        try:
            with StopRequest() as stop, progress:
                results = comparison.run(progress, stop)
        except KeyboardInterrupt:  # the second one: leave at once, results.json and the last checkpoint stand
            return 130
        if ranks.first:
            report = write_report(results, options.output)
            print_results(console, results)
            console.print(Text(f"report: {report}"))
            if results.status == "interrupted":
                console.print(Text("interrupted; the same command with --resume continues"))
        ranks.wait()
    if results.status == "interrupted":
        return stop.exit_code or 1  # 1 on a rank that stopped because another was asked to
    return int(results.status == "failed")


def prepare(options: CompareOptions, *, device: torch.device, ranks: Ranks) -> Comparison:
    """Read, build and check everything that training needs. Raises before anything is trained."""
    require_report_extra()
    settings = _settings(options)
    if options.routers is None:
        entrants, skipped = default_roster(settings)
    else:
        entrants, skipped = named_roster(options.routers, settings), []
    ranks = _spread(options, ranks, settings, device)  # after the roster: a router's plug-in may bring the dispatcher
    comparison = Comparison(
        entrants=entrants,
        skipped=skipped,
        seeds=options.seeds,
        preset=options.preset,
        settings=settings,
        corpus=_corpus(options.text),
        device=device,
        output=options.output,
        resume=options.resume,
        overwrite=options.overwrite,
        ranks=ranks,
    )
    comparison.check()
    return comparison


def introduce(console: Console, comparison: Comparison) -> None:
    """Say what is about to happen, and who does not take part."""
    info = comparison.corpus.info
    labels = ", ".join(entrant.label for entrant in comparison.entrants)
    console.print(Text(f"routers: {labels}"))
    settings, seeds = comparison.settings, ", ".join(map(str, comparison.seeds))
    size = f"{settings.steps} steps of {settings.batch_tokens} bytes"
    console.print(Text(f"preset {comparison.preset}: {size}, seeds {seeds}, on {comparison.device}"))
    experts, pipeline = comparison.ranks.experts, comparison.ranks.pipeline
    if pipeline is not None:
        console.print(
            Text(f"{comparison.ranks.size} ranks, layers in pipelines of {pipeline.size}, {pipeline.schedule.name}")
        )
    if experts is not None:
        ranks = f"{comparison.ranks.size} ranks, experts over groups of {experts.size}"
        console.print(Text(f"{ranks}, dispatcher {experts.label}"))
    console.print(Text(f"corpus: {info.name}, {info.train_bytes / 1e6:.1f} MB, sha256 {info.sha256[:12]}"))
    for item in comparison.skipped:
        console.print(Text(f"skipped {item.label}: {item.reason}"), style="yellow")


def make_console(ranks: Ranks) -> Console:
    """Standard output of the first rank; wide enough for the table where no terminal says how wide it is."""
    console = Console(quiet=not ranks.first)
    return console if console.is_terminal else Console(quiet=not ranks.first, width=120)


def choose_device(name: str) -> torch.device:
    """auto, cpu or cuda as a device; under torchrun the GPU of this rank. Raises ConfigError where there is none."""
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"no device named {name!r}.", where="--device", why="there are auto, cpu and cuda")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError(
            "there is no CUDA device.",
            where="--device cuda",
            why="torch.cuda.is_available() is False",
            fix="use --device cpu, or install a torch that is built for the GPU of this machine",
        )
    if name == "cpu" or not available:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def set_threads() -> None:
    """One thread, unless OMP_NUM_THREADS says otherwise.

    How a sum is split over threads decides its last bits, so one thread gives the same numbers on any number of cores.
    And it holds its speed on a busy machine: two OpenMP threads that must wait for a third process's share of a core
    took 5 times as long per step, one took as long as before.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def _settings(options: CompareOptions) -> Settings:
    changes = parse_changes(options.changes, where="--set")
    twice = sorted(changes.keys() & options.settings.keys())
    if twice:
        raise ConfigError(
            f"{twice[0]!r} is given twice.", where="--set, and an option of its own", why="one would be lost"
        )
    return preset(options.preset).override({**options.settings, **changes})


def _spread(options: CompareOptions, ranks: Ranks, settings: Settings, device: torch.device) -> Ranks:
    """The ranks with layers and experts spread over groups of them, where that was asked for."""
    size, dispatcher, stages = options.expert_parallel, options.dispatcher, options.pipeline
    if options.tensor > 1:
        _expect_no_other_experts(options, f"--tensor {options.tensor}")
        size, dispatcher = options.tensor, "tensor_sliced"
    elif stages > 1:
        _expect_no_other_experts(options, f"--pipeline {stages}")
    elif size == 1 and (dispatcher is not None or options.model_parallel > 1):
        raise ConfigError(
            "there is nothing to dispatch.",
            where=f"--dispatcher {dispatcher} --model-parallel {options.model_parallel}",
            why="every rank has all experts",
            fix="add --expert-parallel N, under torchrun with a multiple of N ranks",
        )
    if stages > 1:
        schedule = schedule_of(
            options.schedule or DEFAULT_SCHEDULE, num_ranks=stages, num_microbatches=settings.accumulation_steps
        )
        runs(settings.num_layers, schedule.num_stages)  # refused before groups are made
        ranks = replace(ranks, pipeline=pipeline_ranks(schedule, tensor=size))
    elif options.schedule is not None:
        raise ConfigError(
            "there is nothing to schedule.",
            where=f"--schedule {options.schedule}",
            why="every rank has all layers",
            fix="add --pipeline P, under torchrun with a multiple of P ranks",
        )
    if size == 1:
        return ranks
    experts = expert_ranks(
        size,
        dispatcher or DEFAULT_DISPATCHER,
        num_experts=settings.num_experts,
        model_parallel=options.model_parallel,
        stages=stages,
        device=device.type,
    )
    return replace(ranks, experts=experts)


def _expect_no_other_experts(options: CompareOptions, where: str) -> None:
    """Raise ConfigError for what spreads experts in another way than --tensor does."""
    if options.expert_parallel > 1 or options.model_parallel > 1 or options.dispatcher is not None:
        raise ConfigError(
            "experts are spread in two ways.",
            where=f"{where}, beside --expert-parallel, --model-parallel or --dispatcher",
            why="--tensor T spreads them over T ranks with the same tokens, and in a pipeline nothing else does",
            fix="take one of them",
        )


def _corpus(text: Path | None) -> Corpus:
    return corpora.standard_library() if text is None else corpora.from_path(text)
