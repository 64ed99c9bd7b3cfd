"""A pool of gloo ranks that lives as long as this process: one start of four processes for all distributed checks.

A case then costs milliseconds. Cases travel as small picklable descriptions, and every rank makes its own shard of
them.
"""

from __future__ import annotations

import atexit
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NoReturn

from moerouters.processes import quick_processes
from moerouters_conformance.violation import Violation

WORLD_SIZE = 4
TIMEOUT_S = 60.0
"""For one job on all ranks; they take well under a second, so whatever needs longer hangs."""
START_S = 180.0
"""More for the first job, which waits for the processes to start: without a fork server 10 s on two idle cores."""
ECHO_S = 1.0
"""After one rank has raised: when a rank dies, others may be told of the lost connection before this process is."""


class RankPool:
    """`WORLD_SIZE` processes with a gloo group over all of them."""

    def __init__(self) -> None:
        context = quick_processes()
        self._folder = tempfile.TemporaryDirectory(prefix="moerouters-ranks-")
        self._started = False
        self._pipes: list[Connection] = []
        self._processes: list[BaseProcess] = []
        for rank in range(WORLD_SIZE):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self._folder.name, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, job: Callable[..., Any], *args: Any) -> list[Any]:
        """[job(rank, *args) on every rank]. Raises Violation if a rank raises, dies, or does not come back in time."""
        for pipe in self._pipes:
            pipe.send((job, args))
        answers: dict[int, Any] = {}
        limit_s = TIMEOUT_S if self._started else TIMEOUT_S + START_S
        deadline, raised = time.monotonic() + limit_s, ""
        while len(answers) < WORLD_SIZE:
            waiting = [rank for rank in range(WORLD_SIZE) if rank not in answers]
            heard = wait([self._pipes[rank] for rank in waiting], timeout=max(0.0, deadline - time.monotonic()))
            ready = [rank for rank in waiting if self._pipes[rank] in heard]
            if not ready:
                # Those that are left may wait in a collective for ever for the one that raised.
                self._fail(raised or f"ranks {waiting} did not come back within {limit_s:.0f} s: they hang")
            for rank in ready:
                try:
                    ok, answers[rank] = self._pipes[rank].recv()
                except (EOFError, ConnectionResetError):
                    self._processes[rank].join(10.0)
                    self._fail(f"rank {rank} died with exit code {self._processes[rank].exitcode}")
                if not ok and not raised:
                    raised = f"rank {rank} raised {answers[rank]}"
                    deadline = min(deadline, time.monotonic() + ECHO_S)
        if raised:
            self._fail(raised)
        self._started = True
        return [answers[rank] for rank in range(WORLD_SIZE)]

    def _fail(self, saw: str) -> NoReturn:
        self.close()
        raise Violation(saw)

    @property
    def alive(self) -> bool:
        return bool(self._processes) and all(process.is_alive() for process in self._processes)

    def close(self, *, patience_s: float = 0.0) -> None:
        """End the processes: idle ones leave by themselves when their pipe closes, others are killed."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(patience_s)
            process.kill()
            process.join()
        self._pipes, self._processes = [], []
        self._folder.cleanup()


_pool: RankPool | None = None


def rank_pool() -> RankPool:
    """The pool of this process; started at the first call, and again after a job hung."""
    global _pool
    if _pool is None or not _pool.alive:
        if _pool is not None:
            _pool.close()
        else:
            atexit.register(_close)
        _pool = RankPool()
    return _pool


def _close() -> None:
    if _pool is not None:
        _pool.close(patience_s=5.0)


def _serve(rank: int, folder: str, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    from moerouters_conformance.subject import blame

    torch.set_num_threads(1)  # the ranks share the machine
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=WORLD_SIZE,
        timeout=timedelta(seconds=START_S),  # the pool itself sees to it that no job takes that long
    )
    while True:
        try:
            job, args = pipe.recv()
        except EOFError:
            return
        try:
            answer = (True, job(rank, *args))
        except Exception as error:
            answer = (False, blame(error))
        with suppress(BrokenPipeError):  # it came too late, and the pool is closed
            pipe.send(answer)
