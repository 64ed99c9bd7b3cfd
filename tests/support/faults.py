"""Ranks that misbehave, in processes of their own whose standard error the parent reads."""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

NAP_S = 600
"""What a rank that hangs sleeps for; the parent ends it."""


def misbehave(what: str) -> Any:
    """`dies`, `is killed`, `hangs` or `raises`."""
    if what == "dies":
        os._exit(3)
    if what == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "hangs":
        time.sleep(NAP_S)
    if what == "raises":
        raise ValueError("no such luck")


def join(rank: int, folder: str, *, ranks: int, patience_s: float, timeout_s: float) -> dist.ProcessGroup:
    """Meet the others; a group whose time-out counts from when all are awake. Standard error goes to RANK.err."""
    with open(f"{folder}/{rank}.err", "w", buffering=1) as errors:
        os.dup2(errors.fileno(), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=patience_s),
    )
    dist.barrier()
    group = dist.new_group(timeout=timedelta(seconds=timeout_s))
    assert isinstance(group, dist.ProcessGroup)
    return group
