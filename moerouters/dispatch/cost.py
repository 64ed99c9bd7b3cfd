"""What each back-end costs: seconds of one forward and backward, from sizes that the host knows.

A collective takes latency + bytes / bandwidth (the alpha-beta model: Hockney, "The communication challenge for MPP",
Parallel Computing 20, 1994), and where the host reads sizes it waits for the device. Rows are taken to be spread evenly
over experts; what the load really is, only the device knows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from moerouters.dispatch.exchange import AllGather, AllToAll, Exchange, ReduceScatter
from moerouters.dispatch.site import Site

_LARGE = 1 << 20
"""float32 numbers that a rank sends to each other rank where bandwidth is measured: 4 MiB."""

_REFUSES = 1.05
"""What `padded` is charged for refusing a later batch whose capacity differs between ranks: it must gain more."""


@dataclass(frozen=True)
class Line:
    """Seconds of one collective over the bytes that a rank sends to the others."""

    latency_s: float
    bytes_per_s: float

    def seconds(self, num_bytes: float) -> float:
        return self.latency_s + num_bytes / self.bytes_per_s


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """What a group of ranks and their devices can do."""

    all_to_all: Line
    all_gather: Line
    reduce_scatter: Line
    host_wait_s: float
    """For the host to learn a number from the device, and to fill the device's queue again."""
    flops_per_s: float
    """Of experts on one rank: what rows without a token cost."""


GLOO = Speeds(
    all_to_all=Line(4e-4, 5e8),
    all_gather=Line(4e-4, 5e8),
    reduce_scatter=Line(4e-4, 2e8),
    host_wait_s=0.0,
    flops_per_s=5e10,
)
"""Two ranks on one busy machine with two cores, as `measure` found them, rounded; the last number is assumed."""

NCCL = Speeds(
    all_to_all=Line(3e-5, 1.5e11),
    all_gather=Line(2.5e-5, 2e11),
    reduce_scatter=Line(2.5e-5, 2e11),
    host_wait_s=4e-5,
    flops_per_s=3e14,
)
"""Assumed, not measured: one machine whose GPUs are linked by NVLink. `measure` tells about others."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """One layer's batch, on the rank that has most of it."""

    num_ranks: int
    tokens: int
    pairs: int
    """tokens * K."""
    num_experts: int
    width: int
    bytes_per_element: int
    capacity: int | None = None

    @property
    def rows(self) -> int:
        """Pairs that travel: what the capacity leaves of them."""
        return self.pairs if self.capacity is None else min(self.pairs, self.places)

    @property
    def places(self) -> int:
        """Rows of the padded buffer."""
        return self.num_experts * (self.capacity or 0)


def costs(sizes: Sizes, speeds: Speeds) -> dict[str, float]:
    """Seconds by back-end; infinite for `padded` without a capacity. For ranks that hold different tokens."""
    return {
        "all_to_all": _all_to_all(sizes, speeds),
        "padded": math.inf if sizes.capacity is None else _padded(sizes, speeds),
        "all_gather": _all_gather(sizes, speeds),
    }


def _all_to_all(sizes: Sizes, speeds: Speeds) -> float:
    """One exchange of counts that the host reads; rows there and back, and so their gradients."""
    counts = speeds.all_to_all.seconds(8 * sizes.num_experts) + speeds.host_wait_s
    return counts + 4 * speeds.all_to_all.seconds(_sent(sizes, sizes.rows))


def _padded(sizes: Sizes, speeds: Speeds) -> float:
    """Headers that nobody waits for, and as many exchanges of full blocks; experts work on every place of them."""
    empty = max(sizes.places - sizes.rows, 0)
    # Three matrices as large as width x width stand for an expert, which a dispatcher does not see; backward costs
    # twice what forward does.
    work = empty * 3 * 3 * 2 * sizes.width**2 / speeds.flops_per_s
    seconds = speeds.all_gather.latency_s + work + 4 * speeds.all_to_all.seconds(_sent(sizes, sizes.places))
    return _REFUSES * seconds


def _all_gather(sizes: Sizes, speeds: Speeds) -> float:
    """Sizes that the host reads; tokens, pairs and weights to all, and sums of results home, in the weights' dtype."""
    others, wide = sizes.num_ranks - 1, max(sizes.bytes_per_element, 4)
    tokens = others * sizes.tokens * sizes.width * sizes.bytes_per_element
    results = others * sizes.tokens * sizes.width * wide
    pairs, weights = others * sizes.pairs * 16, others * sizes.pairs * wide
    gathered = [8 * others * sizes.num_experts, tokens, pairs, weights, results]  # the last in backward
    reduced = [results, tokens, weights]  # the last two in backward
    seconds = sum(map(speeds.all_gather.seconds, gathered)) + sum(map(speeds.reduce_scatter.seconds, reduced))
    return seconds + speeds.host_wait_s


def _sent(sizes: Sizes, rows: int) -> float:
    """Bytes of rows that leave a rank: all but those of its own experts."""
    return rows * sizes.width * sizes.bytes_per_element * (1 - 1 / sizes.num_ranks)


def default_speeds(device: torch.device) -> Speeds:
    """What is assumed of ranks whose tensors are there."""
    return NCCL if device.type == "cuda" else GLOO


def measure(group: dist.ProcessGroup, *, device: torch.device | None = None, repeats: int = 5) -> Speeds:
    """The latency and bandwidth of the group's collectives as they are now; the rest as assumed.

    A collective: every rank of the group calls it, and the slowest rank counts, so all get the same answer. It takes
    repeats + 1 exchanges of 4 MiB with each other rank. device: where the tensors lie; None for the current GPU in a
    group of NCCL, else the CPU. Raises DispatchError where an exchange fails.
    """
    if device is None:
        device = torch.device("cuda" if "nccl" in dist.get_backend(group) else "cpu")
    site = Site(group, backend="measure")

    def all_to_all(n: int) -> Exchange:
        sizes = [n] * site.num_ranks
        return AllToAll(site, send=sizes, receive=sizes)

    line = partial(measure_line, site, device=device, repeats=repeats)
    return replace(
        default_speeds(device),
        all_to_all=line(all_to_all, blocks=site.num_ranks),
        all_gather=line(lambda n: AllGather(site), blocks=1),
        reduce_scatter=line(lambda n: ReduceScatter(site), blocks=site.num_ranks),
    )


def measure_line(
    site: Site, exchange_of: Callable[[int], Exchange], *, blocks: int, device: torch.device, repeats: int
) -> Line:
    """The line of one exchange, of which exchange_of(n) sends n float32 numbers to each other rank, out of blocks * n
    that it is given. A collective; the slowest rank counts."""
    best = [_best_s(exchange_of(n), torch.zeros(blocks * n, device=device), repeats) for n in (1, _LARGE)]
    slowest = torch.tensor(best, dtype=torch.float64, device=device)
    with site.guarded("the comparison of measured speeds"):
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=site.group)
    small_s, large_s = slowest.tolist()
    sent = 4 * _LARGE * max(site.num_ranks - 1, 1)
    return Line(small_s, sent / max(large_s - small_s, 1e-9))


def _best_s(exchange: Exchange, rows: Tensor, repeats: int) -> float:
    """The shortest of some exchanges, after one that sets up connections: what others do meanwhile only adds time."""
    seconds = []
    for _ in range(repeats + 1):
        _finish(rows.device)
        started = time.perf_counter()
        exchange.begin(rows)
        exchange.end()
        _finish(rows.device)
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
