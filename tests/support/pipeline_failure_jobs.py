"""What the ranks of tests/pipeline/test_failures.py do: three train one step, and rank 1 misbehaves."""

from __future__ import annotations

import sys
import time

import torch
from torch import Tensor, nn

from moerouters.pipeline import build
from moerouters.pipeline.runtime import Pipeline
from support.faults import join, misbehave

RANKS, BAD, M = 3, 1, 4
TIMEOUT_S = 12
"""Of the process group that values travel in."""
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


def train(rank: int, folder: str, fault: str) -> None:
    """One step. What is raised leaves the process, as in a user's script."""
    group = join(rank, folder, ranks=RANKS, patience_s=120, timeout_s=TIMEOUT_S)
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
