"""Runs of the lab with spread experts beside the same run in one process: a module that the ranks of a pool import."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from moerouters import record, replay
from moerouters.errors import MoeroutersError
from moerouters.lab.corpus import Corpus
from moerouters.lab.determinism import deterministic
from moerouters.lab.expert_ranks import ExpertRanks, expert_ranks
from moerouters.lab.history import History
from moerouters.lab.interrupt import StopRequest
from moerouters.lab.ranks import Ranks
from moerouters.lab.results import Results
from moerouters.lab.roster import named_roster
from moerouters.lab.run import run_name
from moerouters.lab.settings import Settings
from moerouters.lab.staged import make_trainer
from moerouters.lab.train import Trainer
from moerouters.tape import Tape
from moerouters_conformance.pool import WORLD_SIZE
from support.lab import Listener, run_comparison, timeless

GLOBAL_LOSS = "loss-controlled:alpha=0;global_alpha=0.01;global_load=all_reduce"
"""The Switch loss over what all ranks hold: the tokens that a single process sees in one forward pass."""
CLEAR_SEED = 6
"""With it no token of 20 steps of `topk` and GLOBAL_LOSS on the tiny preset has its K-th and next logit closer together
than 1e-6, which is ten times what the order of sums moves them. Most other seeds have such ties in 120,000 choices."""


on_two_nodes = patch.dict(os.environ, LOCAL_WORLD_SIZE="2")
"""Of two ranks each, as a launcher would tell `hierarchical`."""


@dataclass(frozen=True, kw_only=True)
class Course:
    """What one router trains on, and for how long."""

    item: str
    settings: Settings
    steps: int
    corpus: Corpus
    seed: int = 0

    def trainer(self, ranks: Ranks = Ranks()) -> Trainer:  # noqa: B008  (frozen)
        return make_trainer(
            named_roster(self.item, self.settings)[0],
            seed=self.seed,
            settings=self.settings,
            corpus=self.corpus,
            device=torch.device("cpu"),
            ranks=ranks,
        )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The losses of a run: of each step, and the validation after the last."""

    train_loss: list[float]
    validation_loss: float

    def apart(self, other: Outcome) -> float:
        """The largest difference of two losses."""
        pairs = zip(self.train_loss, other.train_loss, strict=True)
        return max(abs(self.validation_loss - other.validation_loss), *(abs(a - b) for a, b in pairs))


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run on all ranks of the pool, in groups of `size` that spread the experts by `dispatcher`."""

    course: Course
    dispatcher: str
    size: int = WORLD_SIZE
    """1: every rank has all experts."""
    tape: Tape | None = None
    """The routing to replay; None: free."""
    model_parallel: int = 1

    def ranks(self, rank: int) -> Ranks:
        if self.size == 1:
            return Ranks(rank, WORLD_SIZE)
        experts = _spread(self.size, self.dispatcher, self.course.settings.num_experts, self.model_parallel)
        return Ranks(rank, WORLD_SIZE, experts)


def case_of(course: Course, dispatcher: str, **more: Any) -> Case:
    """mesh3d cuts each expert in two; hierarchical finds two nodes of two ranks."""
    return Case(course=course, dispatcher=dispatcher, model_parallel=2 if dispatcher == "mesh3d" else 1, **more)


@cache
def _spread(size: int, dispatcher: str, num_experts: int, model_parallel: int) -> ExpertRanks:
    """Kept: threads of a gloo group wake a hundred times a second, for as long as it is there."""
    return expert_ranks(size, dispatcher, num_experts=num_experts, model_parallel=model_parallel)


def refused(rank: int, dispatcher: str, model_parallel: int) -> str:
    """What is said of a dispatcher that cannot cut experts."""
    try:
        expert_ranks(WORLD_SIZE, dispatcher, num_experts=8, model_parallel=model_parallel)
    except MoeroutersError as error:
        return str(error).splitlines()[0]
    return "nothing"


def alone(course: Course) -> tuple[Outcome, Tape]:
    """The run in this process, and who went where in every forward pass of it, the last validation included."""
    trainer = course.trainer()
    with record(trainer.model) as tape:
        outcome = run(trainer, course.steps)
    return outcome, tape


def replayed(course: Course, tape: Tape) -> Outcome:
    """The run in this process with the routing of `tape`."""
    return _outcome(course, Ranks(), tape)


@on_two_nodes
def spread(rank: int, cases: list[Case]) -> list[Outcome]:
    """The outcome of every case, the same on every rank."""
    return [_outcome(case.course, case.ranks(rank), case.tape) for case in cases]


def _outcome(course: Course, ranks: Ranks, tape: Tape | None) -> Outcome:
    trainer = course.trainer(ranks)
    with nullcontext() if tape is None else replay(trainer.model, _part(tape, ranks)):
        outcome = run(trainer, course.steps)
    ranks.require_same_state(trainer.model)
    return outcome


def _part(tape: Tape, ranks: Ranks) -> Tape:
    """The routing of those sequences that this rank holds."""
    passes = {name: [ranks.part(ids_BSK) for ids_BSK in each] for name, each in tape.expert_ids.items()}
    return replace(tape, expert_ids=passes)


def run(trainer: Trainer, steps: int) -> Outcome:
    """Train, and validate after it."""
    train(trainer, steps)
    with deterministic():
        validation = trainer.validation_loss()
    return Outcome(train_loss=[float(loss) for loss in trainer.history.train_loss], validation_loss=validation)


def train(trainer: Trainer, steps: int) -> None:
    """Deterministically, as a comparison does."""
    with deterministic():
        for _ in range(steps):
            trainer.train_step()


@on_two_nodes
def gradient_norms(rank: int, cases: list[Case]) -> list[float]:
    """The norm by which each case would be clipped in its first step."""
    return [first_norm(case.course.trainer(case.ranks(rank))) for case in cases]


def first_norm(trainer: Trainer) -> float:
    """After one micro-batch."""
    trainer.model.train()
    trainer._micro_batch(0, 0)
    trainer.ranks.average_gradients(trainer.model)
    return float(trainer.ranks.gradient_norm(trainer.model))


def checkpointed(rank: int, case: Case) -> dict[str, Any]:
    """A run in one piece and in two: the state between them, and what both come to."""
    ranks = case.ranks(rank)
    whole, first, second = (case.course.trainer(ranks) for _ in range(3))
    train(whole, 4)
    train(first, 2)
    state = first.state()
    second.load_state(deepcopy(state))  # an optimizer goes on in the very tensors that it is given
    train(second, 2)
    outcomes = [run(trainer, 0) for trainer in (whole, second)]
    return {"outcomes": outcomes, "state": state, "parameters": whole.num_parameters}


def strayed(rank: int, case: Case) -> list[str]:
    """What is said where rank 3 holds another weight, another expert, another state than it should."""
    spoilt: list[Callable[[Trainer], torch.Tensor]] = [
        lambda trainer: trainer.model.embedding.weight,
        lambda trainer: trainer.model.blocks[0].moe.experts.up_eFD,
        lambda trainer: trainer.model.blocks[1].moe.router.expert_bias_E,
    ]
    said = []
    for pick in spoilt:
        trainer = case.course.trainer(case.ranks(rank))
        if rank == 3:
            pick(trainer).data.view(-1)[0] += 1
        try:
            trainer.ranks.require_same_state(trainer.model)
        except MoeroutersError as error:
            said.append(str(error).splitlines()[0])
    return said


def interrupted(rank: int, case: Case, folder: Path) -> dict[str, Any]:
    """A comparison that rank 1 is asked to stop at its third step, and its resumption; beside one in one piece."""
    ranks, course, stop = case.ranks(rank), case.course, StopRequest()

    def press(history: History) -> None:
        if rank == 1 and len(history) == 3:
            stop.signal = signal.SIGTERM

    def compare(output: Path, listener: Listener, stop: StopRequest, *, resume: bool = False) -> Results:
        results = run_comparison(
            output,
            course.corpus,
            course.item,
            settings=course.settings,
            listener=listener,
            stop=stop,
            ranks=ranks,
            resume=resume,
        )
        ranks.wait()  # the first rank has written
        return results

    first = compare(folder / "parts", Listener(press), stop)
    if rank == 0:
        name = run_name(course.item, 0)
        shutil.copy(folder / "parts" / "runs" / name / "checkpoint.pt", folder / "checkpoint.pt")
    listener = Listener()
    second = compare(folder / "parts", listener, StopRequest(), resume=True)
    whole = compare(folder / "whole", Listener(), StopRequest())
    return {
        "statuses": [results.status for results in (first, second, whole)],
        "resumed at": listener.started[0][2],
        "resumed": timeless(second),
        "whole": timeless(whole),
    }
