"""What ranks do in these tests: a module that they can import."""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist

from moerouters.bench.shapes import Shape
from moerouters.planning.calibrate import Measured, measure_here
from moerouters.planning.validation import measure_layers


def number(group: dist.ProcessGroup, added: int) -> int:
    return group.rank() + added


def raising(group: dist.ProcessGroup) -> None:
    if group.rank() == 1:
        raise ValueError("rank one will not")


def dying(group: dist.ProcessGroup) -> None:
    if group.rank() == 1:
        os._exit(3)


def measured(rank: int) -> Measured:
    """On the ranks of the pool."""
    return measure_here(_world(), "cpu", repeats=1)


def layers(rank: int, runs: list[tuple[Shape, str]]) -> list[tuple[float, float, float]]:
    return measure_layers(_world(), runs, "cpu")


def _world() -> Any:
    return dist.group.WORLD
