"""What the ranks of test_deepep.py do: a module that they can import."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from moerouters.errors import MoeroutersError
from support import deep_ep

from .parity import Case, step


@contextmanager
def stand_in() -> Iterator[None]:
    """`import deep_ep` finds it."""
    sys.modules["deep_ep"] = deep_ep
    try:
        yield
    finally:
        del sys.modules["deep_ep"]


def steps(rank: int, cases: list[Case]) -> list[dict[str, Tensor]]:
    with stand_in():
        return [step(rank, case) for case in cases]


def buffers(rank: int, cases: list[Case]) -> list[int]:
    """How many there have been after each case."""
    made, before = [], deep_ep.Buffer.made
    with stand_in():
        for case in cases:
            step(rank, case)
            made.append(deep_ep.Buffer.made - before)
    return made


def message(rank: int, case: Case, installed: bool = True) -> str:
    try:
        if not installed:
            step(rank, case)
        else:
            with stand_in():
                step(rank, case)
    except MoeroutersError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"
