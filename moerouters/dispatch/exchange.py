"""Collectives that autograd knows, each in two halves, start and wait.

What is computed between the halves overlaps with the communication, in backward too: there the gradient starts on its
way back when autograd meets the wait, and is waited for when it meets the start, after what was computed between them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moerouters.dispatch.base import Later, Pending
from moerouters.dispatch.site import Site

# torch 2.13 renamed both; 2.11 knows the old names only.
all_gather_single: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

Started = tuple[Tensor, Any]
"""What will hold the result, and what to wait for (None: nothing)."""


class Exchange(ABC):
    """One use of a collective: its forward, and the collective that carries gradients back."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self._under_way: tuple[Tensor, Started] | None = None

    @abstractmethod
    def forth(self, rows: Tensor) -> Started: ...

    @abstractmethod
    def back(self, grad: Tensor) -> Started: ...

    def begin(self, rows: Tensor, *, backward: bool = False) -> Tensor:
        rows = rows.contiguous()
        with self.site.guarded(self._doing(backward)):
            started = self.back(rows) if backward else self.forth(rows)
        self._under_way = rows, started  # what is being sent must live until it has been sent
        return started[0]

    def end(self, *, backward: bool = False) -> Tensor:
        assert self._under_way is not None, "an exchange is waited for once per start"
        _, (result, work) = self._under_way
        self._under_way = None
        if work is not None:
            with self.site.guarded(self._doing(backward)):
                work.wait()
        return result

    def _doing(self, backward: bool) -> str:
        name = type(self).__name__
        return f"the backward of {name}" if backward else name


def start(rows: Tensor, exchange: Exchange) -> Pending[Tensor]:
    """Send `rows` on their way; `wait` gives what came. Differentiable, the second time too (retain_graph)."""
    coming = _Start.apply(rows, exchange)  # type: ignore[no-untyped-call]
    return Later(lambda: _Wait.apply(coming, exchange))  # type: ignore[no-untyped-call]


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.begin(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # `grad` is what _Wait.backward sent on its way; the exchange knows what it became.
        return ctx.exchange.end(backward=True), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, coming: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        result = exchange.end()
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.exchange.begin(grad, backward=True)
        return grad, None


class AllToAll(Exchange):
    """Rows [sum(send), D] in blocks by rank; what comes is [sum(receive), D] in blocks by rank.

    With pad_to the result has that many rows, the last of them zeros.
    """

    def __init__(self, site: Site, *, send: Sequence[int], receive: Sequence[int], pad_to: int | None = None) -> None:
        super().__init__(site)
        self.send, self.receive = list(send), list(receive)
        self.padding = 0 if pad_to is None else pad_to - sum(self.receive)

    def forth(self, rows: Tensor) -> Started:
        return self._run(rows, self.send, self.receive, self.padding)

    def back(self, grad: Tensor) -> Started:
        return self._run(grad[: grad.shape[0] - self.padding], self.receive, self.send, 0)

    def _run(self, rows: Tensor, send: list[int], receive: list[int], padding: int) -> Started:
        arrived = sum(receive)
        result = rows.new_empty(arrived + padding, *rows.shape[1:])
        result[arrived:] = 0
        work = dist.all_to_all_single(result[:arrived], rows, receive, send, group=self.site.group, async_op=True)
        return result, work


class AllGather(Exchange):
    """[R, ...] of every rank, alike in shape, to [num_ranks * R, ...]. Backward sums what ranks made of each row."""

    def forth(self, rows: Tensor) -> Started:
        return _gathered(rows, self.site)

    def back(self, grad: Tensor) -> Started:
        return _scattered_sum(grad, self.site)


class ReduceScatter(Exchange):
    """[num_ranks * R, ...] of every rank, summed, each rank keeping its block [R, ...]."""

    def forth(self, rows: Tensor) -> Started:
        return _scattered_sum(rows, self.site)

    def back(self, grad: Tensor) -> Started:
        return _gathered(grad, self.site)


class EnterRegion(Exchange):
    """Identity of something all ranks hold alike; backward sums the gradients that each rank has for its part.

    The f of Megatron's tensor parallelism (arXiv:1909.08053, Sec. 3).
    """

    def forth(self, rows: Tensor) -> Started:
        return rows, None

    def back(self, grad: Tensor) -> Started:
        return _summed(grad, self.site)


class LeaveRegion(Exchange):
    """Sum of what each rank has; backward is the identity, since every rank holds the gradient of the sum.

    The g of Megatron's tensor parallelism (arXiv:1909.08053, Sec. 3).
    """

    def forth(self, rows: Tensor) -> Started:
        return _summed(rows, self.site)

    def back(self, grad: Tensor) -> Started:
        return grad, None


class ScatterRegion(Exchange):
    """[num_ranks * R, ...] that all ranks hold alike to each rank's own block [R, ...]; backward gathers the blocks.

    "Scatter to tensor-parallel region" of Megatron-LM (arXiv:1909.08053).
    """

    def forth(self, rows: Tensor) -> Started:
        return _own_block(rows, self.site), None

    def back(self, grad: Tensor) -> Started:
        return _gathered(grad, self.site)


class GatherRegion(Exchange):
    """[R, ...] of every rank, alike in shape, to [num_ranks * R, ...], with which all ranks then do the same: backward
    takes the own block of the gradient, which each rank holds whole, and sums nothing."""

    def forth(self, rows: Tensor) -> Started:
        return _gathered(rows, self.site)

    def back(self, grad: Tensor) -> Started:
        return _own_block(grad, self.site), None


def _gathered(rows: Tensor, site: Site) -> Started:
    result = rows.new_empty(site.num_ranks * rows.shape[0], *rows.shape[1:])
    return result, all_gather_single(result, rows, group=site.group, async_op=True)


def _scattered_sum(rows: Tensor, site: Site) -> Started:
    result = rows.new_empty(rows.shape[0] // site.num_ranks, *rows.shape[1:])
    return result, _reduce_scatter_single(result, rows, group=site.group, async_op=True)


def _own_block(rows: Tensor, site: Site) -> Tensor:
    length = rows.shape[0] // site.num_ranks
    return rows[site.rank * length : (site.rank + 1) * length]


def _summed(rows: Tensor, site: Site) -> Started:
    result = rows.clone()
    return result, dist.all_reduce(result, group=site.group, async_op=True)
