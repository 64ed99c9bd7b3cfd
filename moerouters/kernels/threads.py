"""Several threads for work that numpy does, or torch in pieces: one of them for each of torch's own."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from functools import cache
from typing import TypeVar

import torch

Part = TypeVar("Part")

_kept: list[ThreadPoolExecutor] = []
"""At most one. New threads for each call would have to fault their memory in each time: a top-k of 16384 rows then
takes longer on two threads than on one (7.9 against 6.0 ms)."""
_here = threading.local()
_forked_by: list[int] = []
"""The process that this one is a fork of."""


def share_out(run: Callable[[Iterable[Part]], object], parts: Sequence[Part]) -> None:
    """Call `run` in each of torch.get_num_threads() threads, and return when all have ended.

    Each gets an iterator over the parts that none of the others has taken yet, in their order. torch works without
    gradients there, and alone. With one thread, or one part, or within another's share, all of it happens in the
    caller's.
    """
    threads = min(torch.get_num_threads(), len(parts))
    if threads <= 1 or _within():
        run(parts)
        return
    # A thread's own: in inference mode the caller's tensors can be written to only there.
    mode = torch.inference_mode if torch.is_inference_mode_enabled() else torch.no_grad
    left = deque(parts)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with mode():
                run(_taken_from(left))
        except BaseException as error:
            errors.append(error)

    if (team := _team()) is None:
        wait([_pool().submit(work) for _ in range(threads)])  # they write to memory of the caller's
    else:
        team.GOMP_parallel(_Function(lambda _: work()), None, threads, 0)
    if errors:
        raise errors[0]


def alone_at_once() -> int:
    """Threads that share_out works in, if they are torch's, in which its matrix products are sure to be alone."""
    return 1 if _within() or _team() is None else torch.get_num_threads()


def _taken_from(left: deque[Part]) -> Iterator[Part]:
    with suppress(IndexError):
        while True:
            yield left.popleft()


def _within() -> bool:
    team = _team()
    return getattr(_here, "kept", False) or (team is not None and bool(team.omp_in_parallel()))


def _team() -> ctypes.CDLL | None:
    return None if _threads_stayed_behind() else _openmp()


def _threads_stayed_behind() -> bool:
    """A fork takes no threads along, and GNU's OpenMP would wait for them forever. A fork server has none: it forks
    for others, and does nothing else."""
    if not _forked_by:
        return False
    starter = multiprocessing.parent_process()
    return starter is None or starter.pid == _forked_by[-1]


_Function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@cache
def _openmp() -> ctypes.CDLL | None:
    """torch's own threads, where the library behind them has the entry points of GCC's: on Linux both GNU's and LLVM's.

    They spin for milliseconds after each operation of torch's, waiting for the next, on the cores that other threads
    would want: right after one, a top-k of 16384 rows takes 5.5 ms in one thread, 5.8 in others and 3.6 in these.
    """
    if "parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return None  # its operations would not know that they are in another thread of their own
    try:
        library = ctypes.CDLL(torch._C.__file__)
        library.GOMP_parallel.argtypes = (_Function, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        library.GOMP_parallel.restype = None
        library.omp_in_parallel.restype = ctypes.c_int
    except (AttributeError, OSError):
        return None
    return library


def _pool() -> ThreadPoolExecutor:
    if not _kept:
        _kept.append(ThreadPoolExecutor(os.cpu_count(), "moerouters", initializer=_prepare))
    return _kept[0]


def _prepare() -> None:
    _here.kept = True
    torch.get_num_threads()  # a thread's first question sets its OpenMP to what torch.set_num_threads said
    with suppress(AttributeError, OSError):  # a torch without OpenMP
        # torch.set_num_threads would change what threads to come start with.
        ctypes.CDLL(torch._C.__file__).omp_set_num_threads(1)


def _forget() -> None:
    _kept.clear()
    _forked_by.append(os.getppid())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
