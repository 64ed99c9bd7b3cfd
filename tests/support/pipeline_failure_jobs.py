"""What the ranks of tests/pipeline/test_failures.py do: three train one step, and rank 1 misbehaves."""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moerouters.pipeline import build
from moerouters.pipeline.runtime import Pipeline

RANKS, BAD, M = 3, 1, 4
TIMEOUT_S = 12
"""Of the process group that values travel in."""
NAP_S = 600
"""What a rank that hangs sleeps for; the parent ends it."""
WIDTH = 4


class Stage(nn.Module):
    """Misbehaves in the forward or the backward of the second microbatch, if it is told to."""

    def __init__(self, stage: int, fault: str) -> None:
        super().__init__()
        self.map = nn.Linear(WIDTH, WIDTH)
        self.fault = fault if stage == BAD else ""
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        what, _, when = self.fault.partition(" in ")
        if when == "forward" and self.calls == 2:
            misbehave(what)
        y: Tensor = self.map(x)
        if when == "backward" and self.calls == 2:
            y.register_hook(lambda grad: misbehave(what))
        return y


def misbehave(what: str) -> Any:
    if what == "dies":
        os._exit(3)
    if what == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "hangs":
        time.sleep(NAP_S)
    if what == "raises":
        raise ValueError("no such luck")


def train(rank: int, folder: str, fault: str) -> None:
    """One step. What is raised leaves the process, as in a user's script."""
    with open(f"{folder}/{rank}.err", "w", buffering=1) as errors:
        os.dup2(errors.fileno(), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS, timeout=timedelta(seconds=120)
    )
    dist.barrier()  # from here on all ranks are awake, and the short time-out is about the fault
    group = dist.new_group(timeout=timedelta(seconds=TIMEOUT_S))
    assert isinstance(group, dist.ProcessGroup)
    pipeline = Pipeline(
        build("1f1b", RANKS, M),
        lambda stage: Stage(stage, fault),
        lambda y, target: (y - target).square().mean(),
        group=group,
    )
    began = time.monotonic()
    try:
        pipeline.step(input=torch.ones(M, WIDTH), target=torch.zeros(M, WIDTH))
    finally:
        print(f"after {time.monotonic() - began:.1f} s", file=sys.stderr)
