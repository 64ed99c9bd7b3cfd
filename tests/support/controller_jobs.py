"""Workers for the tests of the controller: what actors import."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
from torch import Tensor

from moerouters.pipeline import Pipeline, Schedule
from moerouters.pipeline.actors import Actor, Call, Processes
from moerouters.pipeline.controller import Seat
from support.pipeline_jobs import WIDTH, Linear, loss_of

BAD = 1
"""The rank with the fault."""


class Trained:
    """A Worker: stages, and an optimizer of them."""

    def __init__(self, seat: Seat, fault: str = "") -> None:
        self.pipeline: Pipeline = seat.pipeline(lambda stage: stage_of(stage, fault), loss_of)
        self.optimizer = torch.optim.SGD(self.pipeline.stages.parameters(), lr=0.1)

    def step(self, **batch: Tensor) -> Tensor | None:
        losses_M = self.pipeline.step(**batch)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return losses_M

    def weights(self, prefix: str) -> dict[str, Tensor]:
        return {prefix + name: weight.detach() for name, weight in self.pipeline.stages.named_parameters()}


def trained(seat: Seat) -> Trained:
    return Trained(seat)


def dying(seat: Seat) -> Trained:
    return Trained(seat, "dies")


def raising(seat: Seat) -> Trained:
    return Trained(seat, "raises")


def unwilling(seat: Seat) -> Trained:
    if seat.rank == BAD:
        raise RuntimeError("no seat")
    return Trained(seat)


def stage_of(stage: int, fault: str = "") -> Linear:
    torch.manual_seed(100 + stage)
    return (Faulty(fault) if fault and stage == BAD else Linear()).double()


class Faulty(Linear):
    """Comes to grief in the second microbatch of the second step of two microbatches."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault, self.calls = fault, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 4 and self.fault == "raises":
            raise ValueError("no such luck")
        if self.calls == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


def batch(step: int, microbatches: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    shape = (3 * microbatches, WIDTH)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name in ("input", "target")}


def alone(schedule: Schedule, steps: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Losses and weights after training in one process."""
    stages = torch.nn.ModuleDict({str(stage): stage_of(stage) for stage in range(schedule.num_stages)})
    optimizer = torch.optim.SGD(stages.parameters(), lr=0.1)
    M, losses = schedule.num_microbatches, []
    for step in range(steps):
        found = []
        for x, target in zip(*(part.tensor_split(M) for part in batch(step, M).values()), strict=True):
            for stage in stages.values():
                x = stage(x)
            loss = loss_of(x, target)
            (loss / M).backward()
            found.append(loss.detach())
        losses.append(torch.stack(found))
        optimizer.step()
        optimizer.zero_grad()
    return losses, {name: weight.detach() for name, weight in stages.named_parameters()}


class Counting(Processes):
    """Processes whose calls are counted."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, tuple[str, ...]]] = []
        """(actor, method, names of the arguments)."""

    def start(self, name: str, build: Any) -> Actor:
        return _Counted(name, super().start(name, build), self.calls)


class _Counted:
    def __init__(self, name: str, actor: Actor, calls: list[tuple[str, str, tuple[str, ...]]]) -> None:
        self._name, self._actor, self._calls = name, actor, calls

    def call(self, method: str, *args: Any, **kwargs: Any) -> Call:
        self._calls.append((self._name, method, tuple(kwargs)))
        return self._actor.call(method, *args, **kwargs)

    def kill(self) -> None:
        self._actor.kill()
