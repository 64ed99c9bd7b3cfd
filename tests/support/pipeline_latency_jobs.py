"""Stages that only take time, and links that are slow, on the ranks of the pool: how long a step takes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moerouters.pipeline import Link, Network, Schedule, StageCost, simulate
from moerouters.pipeline.runtime import Pipeline
from moerouters.pipeline.transport import Transport, Work

UNIT_S = 0.08
"""What a forward takes in a model of as many stages as ranks; a backward takes twice that."""


class SlowLinks(Transport):
    """Every message leaves `latency_s` after it was given; messages of a link travel beside each other."""

    def __init__(self, group: dist.ProcessGroup, latency_s: float) -> None:
        super().__init__(group)
        self.latency_s = latency_s
        self._links: dict[int, ThreadPoolExecutor] = {}

    def start(self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]) -> list[Work]:
        due = time.monotonic() + self.latency_s
        later: list[Work] = []
        for tensor, peer in sends:
            link = self._links.setdefault(peer, ThreadPoolExecutor(1))  # one thread keeps messages in order
            later.append(_Later(link.submit(self._send, due, tensor, peer)))
        return later + super().start([], receives)

    def _send(self, due: float, tensor: Tensor, peer: int) -> Work:
        time.sleep(max(0.0, due - time.monotonic()))
        return super().start([(tensor, peer)], [])[0]


class _Later:
    def __init__(self, sending: Future[Work]) -> None:
        self._sending = sending

    def wait(self) -> object:
        return self._sending.result().wait()

    def is_completed(self) -> bool:
        return self._sending.done() and self._sending.result().is_completed()


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return x * 1

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        time.sleep(2 * ctx.seconds)
        return grads[0], torch.zeros(()), None


class Nap(nn.Module):
    """A stage."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds, self.weight = seconds, nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        slept: Tensor = _Sleep.apply(x, self.weight, self.seconds)  # type: ignore[no-untyped-call]
        return slept


def step_s(rank: int, schedule: Schedule, latency: float) -> float:
    """Seconds of the fastest of three steps, after one that agrees on forms; latency in units of a forward."""
    world = dist.group.WORLD
    assert world is not None
    chunks = schedule.num_stages // schedule.num_ranks
    links = SlowLinks(world, latency * UNIT_S)
    pipeline = Pipeline(
        schedule, lambda stage: Nap(UNIT_S / chunks), lambda y, target: (y - target).mean(), transport=links
    )
    batch = {name: torch.ones(schedule.num_microbatches, 4) for name in ("input", "target")}
    pipeline.step(**batch)
    took = []
    for _ in range(3):
        dist.barrier()
        began = time.monotonic()
        pipeline.step(**batch)
        dist.barrier()
        took.append(time.monotonic() - began)
    return min(took)


def predicted_s(schedule: Schedule, latency: float) -> float:
    """By the simulator."""
    chunks = schedule.num_stages // schedule.num_ranks
    costs = StageCost(forward=1 / chunks, input_backward=1 / chunks, weight_backward=1 / chunks)
    return UNIT_S * float(simulate(schedule, costs, Network(link=Link(latency=latency))).makespan)
