"""Add a forward's counts to running sums, exactly once per token.

A forward can run twice for the same tokens: activation checkpointing repeats it inside the backward pass, and
torch.compile may repeat it there too. Only the first run may count. "Not inside a backward" is the one test that is
right with reentrant and non-reentrant checkpointing, eager and compiled; read in Python it would be frozen (or break
the graph) when traced, so the test lives in a custom operator and is made when the operator runs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def inside_backward() -> bool:
    """Whether this thread is executing an autograd backward pass right now.

    -1 is what torch._C._current_graph_task_id returns outside of any. The function is private to torch; it is what
    torch.utils.checkpoint itself uses (get_device_states), it exists since torch 2.1, and it is wrapped only here.
    """
    return bool(torch._C._current_graph_task_id() != -1)


@torch.library.custom_op("moerouters::accumulate_", mutates_args=("sums",))
def accumulate_(sums: list[Tensor], values: list[Tensor]) -> None:
    """sums[i] += values[i] in place, unless this runs inside a backward pass. Same length, shapes and dtypes."""
    if inside_backward():
        return
    for total, value in zip(sums, values, strict=True):
        total.add_(value.detach())


@accumulate_.register_fake
def _(sums: list[Tensor], values: list[Tensor]) -> None:
    return None
