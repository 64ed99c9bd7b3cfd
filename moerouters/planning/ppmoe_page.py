"""PPMoE end to end (arXiv:2304.11414): a model three ways on four ranks, measured; and on its cluster, by formula.

    python -m moerouters.planning.ppmoe_page measure docs --note "..."   # docs/benchmarks/ppmoe.json; half a minute
    python -m moerouters.planning.ppmoe_page render docs                 # the section of docs/pipeline.md

`make docs` renders; a test fails when the page is stale.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Literal

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict

from moerouters.bench.rows import Stamp, stamp
from moerouters.lab.corpus import standard_library
from moerouters.lab.expert_ranks import expert_ranks
from moerouters.lab.files import write_text
from moerouters.lab.pages import markdown_table, with_part
from moerouters.lab.pipeline_ranks import pipeline_ranks
from moerouters.lab.presets import preset
from moerouters.lab.ranks import Ranks
from moerouters.lab.roster import named_roster
from moerouters.lab.staged import make_trainer
from moerouters.lab.train import Trainer
from moerouters.pipeline import build
from moerouters.planning import ppmoe_steps as steps
from moerouters.planning.ranks import on_ranks

RANKS, WARM_UP = 4, 2
SETTINGS = preset("tiny").override(
    {
        "hidden_size": 192,
        "num_layers": 4,
        "top_k": 1,
        "renormalize": False,  # the one weight would be 1, and the gate learn nothing
        "expert_size": 512,
        "micro_batch_size": 4,
        "accumulation_steps": 8,
    }
)
WAYS = {
    "ppmoe": "PPMoE: pipeline 2 x tensor 2, 1F1B",
    "all_to_all": "experts over 4 by all-to-all, data 4",
    "dense": "dense backbone, data 4",
}
_BESIDE = ("all_to_all", "dense")
_PROJECTED = {
    "ppmoe": "PPMoE",
    "all_to_all": "all-to-all",
    "all_to_all with copies": "all-to-all with copies",
    "dense": "dense",
}
_MEASURED = ("way", "ms a step", "tokens/s", "over all-to-all", "over dense")
_OTHERS = {way: name for way, name in _PROJECTED.items() if way != "ppmoe"}


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Projected(_Record):
    """One cluster."""

    shared_port: bool
    slowed: bool
    flops_per_s: float
    tokens_per_s: dict[str, float]
    """Of a GPU, by way."""


class PPMoE(_Record):
    """docs/benchmarks/ppmoe.json."""

    schema_version: Literal[1] = 1
    run: Stamp
    step_ms: dict[str, tuple[float, ...]]
    """By way, of every step after the first ones; the slowest rank's."""
    losses: dict[str, tuple[float, ...]]
    """By way, of every step."""
    projected: tuple[Projected, ...]


def measure(docs: Path, note: str, count: int) -> None:
    """Train each way in turn, a step at a time, and write the JSON."""
    taken = on_ranks(train, RANKS, count)
    step_ms = {
        way: tuple(round(1e3 * max(each), 2) for each in zip(*(rank[0][way] for rank in taken), strict=True))
        for way in WAYS
    }
    found = PPMoE(
        run=stamp(kind="cpu", threads=1, note=note),
        step_ms={way: each[WARM_UP:] for way, each in step_ms.items()},
        losses=taken[0][1],
        projected=project(),
    )
    write_text(docs / "benchmarks" / "ppmoe.json", found.model_dump_json() + "\n")


def train(group: dist.ProcessGroup, count: int) -> tuple[dict[str, list[float]], dict[str, tuple[float, ...]]]:
    """Seconds of this rank's steps by way, and their losses."""
    trainers = {way: _trainer(way, group.rank()) for way in WAYS}
    took: dict[str, list[float]] = {way: [] for way in WAYS}
    order = list(WAYS)
    for step in range(count):
        turn = step % len(order)
        for way in order[turn:] + order[:turn]:  # nobody is always first
            dist.barrier()
            began = time.perf_counter()
            trainers[way].train_step()
            took[way].append(time.perf_counter() - began)
    return took, {way: tuple(map(float, each.history.train_loss)) for way, each in trainers.items()}


def _trainer(way: str, rank: int) -> Trainer:
    ranks, settings = Ranks(rank, RANKS), SETTINGS
    if way == "ppmoe":
        pipeline = pipeline_ranks(build("1f1b", 2, settings.accumulation_steps), tensor=2)
        experts = expert_ranks(2, "tensor_sliced", num_experts=settings.num_experts, stages=2)
        ranks = Ranks(rank, RANKS, experts, pipeline)
    elif way == "all_to_all":
        ranks = Ranks(rank, RANKS, expert_ranks(4, "all_to_all", num_experts=settings.num_experts))
    else:
        settings = settings.override({"dense_size": settings.expert_size})
    entrant = None if way == "dense" else named_roster("topk", settings)[0]
    return make_trainer(
        entrant, seed=0, settings=settings, corpus=standard_library(), device=torch.device("cpu"), ranks=ranks
    )


def project() -> tuple[Projected, ...]:
    """All clusters."""
    return tuple(_projected(shared, slowed) for slowed in (False, True) for shared in (False, True))


def _projected(shared_port: bool, slowed: bool) -> Projected:
    machine = steps.cluster(shared_port=shared_port, slowed=slowed)
    ways = {
        "ppmoe": steps.ppmoe(machine),
        "all_to_all": steps.all_to_all(machine),
        "all_to_all with copies": steps.all_to_all_with_copies(machine),
        "dense": steps.dense(machine),
    }
    return Projected(
        shared_port=shared_port,
        slowed=slowed,
        flops_per_s=float(f"{machine.flops_per_s:.4g}"),
        tokens_per_s={name: float(f"{way.tokens_per_s:.4g}") for name, way in ways.items()},
    )


def section(found: PPMoE) -> str:
    """The Markdown between the marks of the page."""
    run, s = found.run, SETTINGS
    lines = [
        f"{run.date}, {run.device}, {RANKS} ranks over gloo, a thread each; python {run.versions['python']}, torch "
        f"{run.versions['torch']}. {run.note}",
        "",
        f"Measured: {s.num_layers} layers, width {s.hidden_size}, {s.num_experts} experts of {s.expert_size} in each, "
        f"K = {s.top_k}; {s.accumulation_steps} micro-batches of {s.micro_batch_size * s.sequence_length} tokens; "
        f"the ways in turn, a step at a time. Medians of {len(found.step_ms['ppmoe'])} steps, and quartiles.",
        "",
        markdown_table(_MEASURED, _measured(found, s.batch_tokens)),
        "",
        "By formula, on the paper's 32 V100 with its GPT-3 Medium (tokens/s of a GPU):",
        "",
        markdown_table(
            ("arithmetic", "100 Gb/s port", *_PROJECTED.values(), *(f"PPMoE over {name}" for name in _OTHERS.values())),
            [_row(each) for each in found.projected],
        ),
    ]
    return "\n".join(lines)


def _measured(found: PPMoE, tokens: int) -> list[tuple[str, ...]]:
    rows = []
    for way, name in WAYS.items():
        ms = median(found.step_ms[way])
        faster = (_faster(found.step_ms[other], found.step_ms[way]) for other in _BESIDE)
        rows.append((name, f"{ms:.0f}", f"{1e3 * tokens / ms:,.0f}", *faster))
    return rows


def _faster(others: Sequence[float], own: Sequence[float]) -> str:
    """How many times as fast, step by step: the median and quartiles."""
    low, middle, high = quantiles((b / a for a, b in zip(own, others, strict=True)), n=4, method="inclusive")
    return "1" if low == high == 1 else f"{middle:.2f} ({low:.2f} to {high:.2f})"


def _row(each: Projected) -> tuple[str, ...]:
    rates = each.tokens_per_s
    arithmetic = f"{1e-12 * each.flops_per_s:.3g} TFLOP/s, " + ("as its backbone had" if each.slowed else "the peak")
    return (
        arithmetic,
        "one a node" if each.shared_port else "one a GPU",
        *(f"{rates[way]:,.0f}" for way in _PROJECTED),
        *(f"{rates['ppmoe'] / rates[way]:.2f}" for way in _OTHERS),
    )


def rendered(page: str, found: PPMoE) -> str:
    """The page with its section made anew."""
    return with_part(page, "ppmoe", section(found))


def load(docs: Path) -> PPMoE:
    """What is committed."""
    return PPMoE.model_validate_json((docs / "benchmarks" / "ppmoe.json").read_bytes())


def main(arguments: Sequence[str] | None = None) -> None:
    """The commands of the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m moerouters.planning.ppmoe_page")
    parser.add_argument("command", choices=("measure", "render"))
    parser.add_argument("docs", type=Path)
    parser.add_argument("--note", default="", help="a remark that is kept with what was measured")
    parser.add_argument("--steps", type=int, default=22, help="to measure")
    options = parser.parse_args(arguments)
    if options.command == "measure":
        measure(options.docs, options.note, options.steps)
        return
    path = options.docs / "pipeline.md"
    path.write_text(rendered(path.read_text(encoding="utf-8"), load(options.docs)), encoding="utf-8")


if __name__ == "__main__":
    main()
