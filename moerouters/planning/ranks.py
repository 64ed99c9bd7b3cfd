"""A few ranks on this machine, for measuring: processes of their own that run one function and answer."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from moerouters.errors import MoeroutersError
from moerouters.processes import quick_processes

TIMEOUT_S = 600.0
"""Of everything that the ranks do, their start included."""


def on_ranks(job: Callable[..., Any], num_ranks: int, *args: Any, device: str = "cpu") -> list[Any]:
    """[job(group, *args) on every rank], over gloo, or NCCL with a GPU for each rank. `job` is a function of a module.

    Raises MoeroutersError where a rank raises, dies or does not come back.
    """
    context = quick_processes()
    with tempfile.TemporaryDirectory(prefix="moerouters-ranks-") as folder:
        pipes: list[Connection] = []
        processes = []
        for rank in range(num_ranks):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_run, args=(theirs, folder, rank, num_ranks, device, job, args), daemon=True
            )
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            return _answers(pipes)
        finally:
            for process in processes:
                process.join(5.0)
                process.kill()
                process.join()


def _answers(pipes: list[Connection]) -> list[Any]:
    answers: dict[int, Any] = {}
    deadline = time.monotonic() + TIMEOUT_S
    while len(answers) < len(pipes):
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in answers}
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise _failed(f"ranks {sorted(waiting.values())} did not answer within {TIMEOUT_S:.0f} s.")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = waiting[pipe]
            try:
                done, answers[rank] = pipe.recv()
            except EOFError:
                raise _failed(f"rank {rank} of {len(pipes)} died.") from None
            if not done:
                raise _failed(f"rank {rank} of {len(pipes)} raised {answers[rank]}")
    return [answers[rank] for rank in range(len(pipes))]


def _failed(what: str) -> MoeroutersError:
    return MoeroutersError(what, why="its output says more", fix="try again with fewer ranks, or less memory in use")


def _run(
    pipe: Connection, folder: str, rank: int, num_ranks: int, device: str, job: Callable[..., Any], args: Any
) -> None:
    torch.set_num_threads(1)  # ranks share the processors
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    dist.barrier()  # a rank that ends before others have connected takes them with it
    try:
        answer = (True, job(dist.group.WORLD, *args))
    except Exception as error:
        answer = (False, f"{type(error).__name__}: {error}")
    pipe.send(answer)
    dist.destroy_process_group()
