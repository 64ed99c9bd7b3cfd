"""The command `moerouters leak` behind its options."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from rich.text import Text as Line

from moerouters import registry
from moerouters.errors import ConfigError
from moerouters.inspecting.inspect_command import make_console
from moerouters.inspecting.inspect_console import table
from moerouters.lab.files import write_text
from moerouters.lab.job import set_threads
from moerouters.lab.overrides import label, parse_changes, parse_routers
from moerouters.leaking.estimate import measure
from moerouters.leaking.report import Experiment, LeakReport
from moerouters.registry.configs import field_errors
from moerouters.router import Router


def run_leak(names: Sequence[str], *, settings: Sequence[str], json: Path | None, **options: Any) -> LeakReport:
    """Measure the routers, print the table and write what was asked for."""
    experiment = make_experiment(options)
    routers = build_routers(names, settings, experiment)
    set_threads()
    report = measure_all(routers, experiment)
    _print(report)
    if json is not None:
        write_text(json, report.model_dump_json(indent=2) + "\n")
    return report


def make_experiment(options: dict[str, Any]) -> Experiment:
    """Raises ConfigError that names the wrong option."""
    try:
        return Experiment(**options)
    except ValidationError as error:
        raise ConfigError(
            "the experiment cannot be made.",
            where=", ".join(f"{name}={value}" for name, value in options.items()),
            why="\n".join(field_errors(error)),
            fix="`moerouters leak --help` lists the options",
        ) from None


def build_routers(names: Sequence[str], settings: Sequence[str], experiment: Experiment) -> dict[str, Router]:
    """By label. Each name may carry settings of its own (name:key=value;key=value); `settings` hold for all of them."""
    common = parse_changes(settings, where="--setting")
    routers: dict[str, Router] = {}
    for _, name, own in (parsed for text in names for parsed in parse_routers(text)):
        config = common | own
        written = label(name, config)
        if written in routers:
            raise ConfigError(f"{written!r} is named twice.", why="the rows would be the same", fix="name it once")
        routers[written] = registry.build(name, experiment.gating(registry.info(name).spec.gating), config=config)
    return routers


def measure_all(routers: dict[str, Router], experiment: Experiment) -> LeakReport:
    """One router after the other, each with the same tokens."""
    leaks = tuple(measure(router, experiment, label=written) for written, router in routers.items())
    return LeakReport(experiment=experiment, torch=str(torch.__version__), routers=leaks)


def _print(report: LeakReport) -> None:
    console, given = make_console(), report.experiment
    console.print(
        Line(
            f"E={given.num_experts}, K={given.top_k}, {given.score}, {given.tokens} tokens per forward, in training; "
            f"{given.samples} futures for each of {given.repeats} pasts at {given.positions} positions"
        )
    )
    shown = table(("router", "bits per token", "95% interval", "distinct", "declared causal", "expert choice, figure"))
    for leak in report.routers:
        figure = "-" if leak.expert_choice_bits is None else f"{leak.expert_choice_bits:.2f}"
        interval, promise = f"{leak.low:.3f} - {leak.high:.3f}", "yes" if leak.causal else "no"
        shown.add_row(Line(leak.label), f"{leak.bits:.3f}", interval, str(leak.distinct), promise, figure)
    console.print(shown)
    console.print(
        Line(
            "bits: what the experts of a token tell about later tokens, per layer; no more than "
            f"{math.log2(given.samples):.1f} can be seen with so many futures. distinct: most choices seen for one "
            "token and past. figure: K log2((1 - R) / R), R = K / E, of arXiv:2408.15664."
        ),
        style="dim",
    )
    for leak in report.routers:
        if leak.causal and leak.bits > 0:
            told = f"{leak.label} declares causal=True, and later tokens change its choice: see `moerouters check`, A01"
            console.print(Line(told), style="yellow")
