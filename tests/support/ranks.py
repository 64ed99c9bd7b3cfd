"""Run a function on several gloo ranks and collect what each returns."""

import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from moerouters.processes import quick_processes


def on_ranks(function: Callable[[int], Any], world_size: int = 2) -> list[Any]:
    """[function(rank) for every rank], each in a process of its own; `function` lives in an importable module."""
    with tempfile.TemporaryDirectory() as folder:
        method = quick_processes().get_start_method()
        mp.start_processes(_rank_main, args=(function, world_size, folder), nprocs=world_size, start_method=method)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


def _rank_main(rank: int, function: Callable[[int], Any], world_size: int, folder: str) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    try:
        torch.save(function(rank), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
