"""Runs of the lab in a pipeline beside the same run in one process: a module that the ranks of a pool import."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from moerouters import replay
from moerouters.errors import MoeroutersError
from moerouters.lab.expert_ranks import ExpertRanks, expert_ranks
from moerouters.lab.interrupt import StopRequest
from moerouters.lab.pipeline_ranks import PipelineRanks, pipeline_ranks, schedule_of
from moerouters.lab.ranks import Ranks
from moerouters.lab.staged import StagedTrainer
from moerouters.lab.train import Trainer
from moerouters.tape import Tape
from moerouters_conformance.pool import WORLD_SIZE
from support.expert_parallel import Course, Outcome, run, train
from support.lab import Listener, run_comparison


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run on all ranks of the pool: pipelines of `stages` ranks whose stages are on `tensor` ranks each."""

    course: Course
    stages: int = 2
    tensor: int = 2
    schedule: str = "1f1b"
    tape: Tape | None = None
    """The routing to replay; None: free."""

    def ranks(self, rank: int) -> Ranks:
        s = self.course.settings
        pipeline = _pipeline(self.schedule, self.stages, s.accumulation_steps, self.tensor)
        experts = _experts(self.tensor, s.num_experts, self.stages) if self.tensor > 1 else None
        return Ranks(rank, WORLD_SIZE, experts, pipeline)


@cache
def _pipeline(name: str, stages: int, microbatches: int, tensor: int) -> PipelineRanks:
    """Kept: threads of a gloo group wake a hundred times a second, for as long as it is there."""
    return pipeline_ranks(schedule_of(name, num_ranks=stages, num_microbatches=microbatches), tensor=tensor)


@cache
def _experts(tensor: int, num_experts: int, stages: int) -> ExpertRanks:
    return expert_ranks(tensor, "tensor_sliced", num_experts=num_experts, stages=stages)


def staged(rank: int, cases: list[Case]) -> list[Outcome]:
    """The outcome of every case, the same on every rank."""
    return [_outcome(case, case.ranks(rank)) for case in cases]


def _outcome(case: Case, ranks: Ranks) -> Outcome:
    trainer = case.course.trainer(ranks)
    assert isinstance(trainer, StagedTrainer)
    if case.tape is None:
        outcome = run(trainer, case.course.steps)
    else:
        with replay(trainer.model, _part(case.tape, trainer)):
            outcome = run(trainer, case.course.steps)
    ranks.require_same_state(trainer.model)
    return outcome


def _part(tape: Tape, trainer: Trainer) -> Tape:
    """The routing of those sequences and layers that this rank holds."""
    assert trainer.handle is not None
    passes = {name: [trainer.ranks.part(ids) for ids in tape.expert_ids[name]] for name in trainer.handle.layers}
    return replace(tape, expert_ids=passes)


def looked_at(rank: int, case: Case) -> dict[str, Any]:
    """After two steps: losses, loads, gradient norm and balance; a checkpoint, and what comes of it."""
    ranks = case.ranks(rank)
    whole, first, second = (case.course.trainer(ranks) for _ in range(3))
    train(first, 2)
    norm = float(ranks.gradient_norm(first.model))
    state = first.state()
    second.load_state(deepcopy(state))
    train(second, 2)
    return {
        "history": first.history.tensors(),
        "norm": norm,
        "weights": state["model"],
        "parameters": first.num_parameters,
        "outcomes": [run(whole, 4), run(second, 0)],
        "max_vio": second.validate().max_vio,
    }


def broken(rank: int, case: Case) -> str:
    """What every rank raises where the gate of one layer gives NaN."""
    trainer = case.course.trainer(case.ranks(rank))
    for name, parameter in trainer.model.named_parameters():
        if name == "blocks.1.moe.gate.weight":
            parameter.data[0, 0] = float("nan")
    try:
        trainer.train_step()
    except MoeroutersError as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return "nothing"


def compared(rank: int, case: Case, folder: Path) -> dict[str, Any]:
    """A comparison, its resumption after the second step, and what its results say of where it ran."""
    ranks, course = case.ranks(rank), case.course
    stop = StopRequest()

    def press(history: Any) -> None:
        if rank == 1 and len(history) == 2:
            stop.signal = 15

    found = []
    for listener, wish, resume in ((Listener(press), stop, False), (Listener(), StopRequest(), True)):
        found.append(
            run_comparison(
                folder,
                course.corpus,
                course.item,
                settings=course.settings,
                listener=listener,
                stop=wish,
                ranks=ranks,
                resume=resume,
            )
        )
        ranks.wait()  # the first rank has written
    environment = found[1].environment
    return {
        "statuses": [results.status for results in found],
        "perplexity": found[1].runs[0].perplexity,
        "environment": (environment.pipeline, environment.schedule, environment.expert_parallel),
        "share": found[1].runs[0].router_share,
    }


def refused(rank: int, stages: int, tensor: int) -> str:
    try:
        pipeline_ranks(schedule_of("1f1b", num_ranks=stages, num_microbatches=2), tensor=tensor)
    except MoeroutersError as error:
        return str(error).splitlines()[0]
    return "nothing"
