"""The pool of ranks survives what ranks do."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from moerouters_conformance import Violation, pool
from moerouters_conformance.pool import WORLD_SIZE, rank_pool

pytestmark = pytest.mark.slow  # every test but the first pays for a new pool, 5 to 10 s


def total(rank: int, factor: int) -> int:
    value = torch.tensor(rank * factor)
    dist.all_reduce(value)
    return int(value)


def raises_on_2(rank: int) -> None:
    if rank == 2:
        raise ValueError("not me")
    dist.barrier()


def dies_on_1(rank: int) -> None:
    if rank == 1:
        os._exit(5)
    dist.barrier()


def dies_on_1_after_others_raised(rank: int) -> None:
    if rank == 1:
        time.sleep(0.3)
        os._exit(5)
    if rank == 2:
        raise RuntimeError("connection lost")
    dist.barrier()


def hangs(rank: int) -> None:
    if rank == 0:
        time.sleep(60)


def test_ranks_talk() -> None:
    assert rank_pool().run(total, 10) == [60] * WORLD_SIZE


def test_a_rank_that_raises_is_named_though_the_others_wait() -> None:
    with pytest.raises(Violation, match="rank 2 raised ValueError: not me"):
        rank_pool().run(raises_on_2)
    assert rank_pool().run(total, 1) == [6] * WORLD_SIZE


def test_a_rank_that_dies_is_named() -> None:
    with pytest.raises(Violation, match="rank 1 died with exit code 5"):
        rank_pool().run(dies_on_1)


def test_a_rank_that_dies_is_named_though_others_were_told_first() -> None:
    with pytest.raises(Violation, match="rank 1 died with exit code 5"):
        rank_pool().run(dies_on_1_after_others_raised)


def test_a_rank_that_hangs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    rank_pool().run(total, 1)
    monkeypatch.setattr(pool, "TIMEOUT_S", 2.0)
    with pytest.raises(Violation, match=r"ranks \[0\] did not come back within 2 s"):
        rank_pool().run(hangs)
