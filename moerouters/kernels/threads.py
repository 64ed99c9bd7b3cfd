"""Several threads for work that numpy does, or torch in pieces: one of them for each of torch's own."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

import torch

Part = TypeVar("Part")

_kept: list[ThreadPoolExecutor] = []
"""At most one. New threads for each call would have to fault their memory in each time: a top-k of 16384 rows then
takes longer on two threads than on one (7.9 against 6.0 ms), and 4.8 on threads that are kept."""
_here = threading.local()


def share_out(run: Callable[[Sequence[Part]], object], parts: Sequence[Part]) -> None:
    """Call `run` on some of the parts in each of torch.get_num_threads() threads, and return when all are done.

    There torch works without gradients, and alone: its own threads would spin for milliseconds after each operation
    on the cores that the other parts want. With one thread, or one part, all of it happens in the caller's.
    """
    threads = min(torch.get_num_threads(), len(parts))
    if threads <= 1 or getattr(_here, "kept", False):
        run(parts)
        return
    # A thread's own: in inference mode the caller's tensors can be written to only there.
    mode = torch.inference_mode if torch.is_inference_mode_enabled() else torch.no_grad

    def run_some(some: Sequence[Part]) -> None:
        with mode():
            run(some)

    work = [_pool().submit(run_some, parts[n::threads]) for n in range(threads)]
    for each in work:  # they write to memory of the caller's
        each.exception()
    for each in work:
        each.result()


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


# A fork takes no threads along.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_kept.clear)
