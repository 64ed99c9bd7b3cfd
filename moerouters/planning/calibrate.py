"""What this machine can do, measured: a Cluster from a few ranks on it, beside each other as in a run.

All ranks work at the same time, and the slowest counts; of several such rounds the shortest does, since what others do
on the machine only adds to it. How many ranks' worth of arithmetic a machine does in all is measured too: two
processors may be those of one core. The cluster says what a rank alone would get.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict

from moerouters import Gating, MoELayer
from moerouters.builtin import TopKRouter
from moerouters.dispatch.cost import Line, measure, measure_line
from moerouters.dispatch.exchange import Exchange, LeaveRegion
from moerouters.dispatch.local import LocalDispatcher
from moerouters.dispatch.plan import make_plan
from moerouters.dispatch.site import Site
from moerouters.kernels.expert_mlp import expert_mlp
from moerouters.planning.cluster import Cluster, Collective, Link
from moerouters.planning.ranks import on_ranks

RANKS = (1, 2, 4)
_EXPERTS, _ROWS, _WIDTH, _EXPERT_WIDTH = 4, 256, 256, 512
"""Of the experts whose arithmetic is timed; rows of each."""
_TOKENS, _SLOTS = 1 << 11, 4
"""Tokens that are gathered and summed, and experts of each: 1 KiB a row, more than a core's second cache holds."""
_ROUND_S = 0.03
"""Of a round, at least: ranks do not begin at the same moment."""
_COLLECTIVES: tuple[Collective, ...] = ("all_to_all", "all_gather", "reduce_scatter", "all_reduce")


class Measured(BaseModel):
    """What so many ranks found, each at work at the same time."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ranks: int
    flops_per_s: float
    memory_bytes_per_s: float
    forward_s: float
    backward_s: float
    latency_s: dict[Collective, float] = {}
    bytes_per_s: dict[Collective, float] = {}


def calibrate(*, ranks: Sequence[int] = RANKS, device: str = "cpu", name: str = "this-machine") -> Cluster:
    """Measure worlds of these sizes, 1 among them, and take what explains them best."""
    return fitted([on_ranks(measure_here, n, device, device=device)[0] for n in ranks], device=device, name=name)


def fitted(worlds: Sequence[Measured], *, device: str, name: str) -> Cluster:
    """The Cluster of several measured worlds, that of one rank among them; of that alone, without a link worth the
    name."""
    alone = next(world for world in worlds if world.ranks == 1)
    most = max(world.ranks for world in worlds)
    processors = None
    if device == "cpu":
        processors = max(world.ranks * world.flops_per_s / alone.flops_per_s for world in worlds)
    bare = Cluster(
        name=name,
        source=f"measured with {', '.join(str(world.ranks) for world in worlds)} ranks over "
        + ("gloo" if device == "cpu" else "NCCL"),
        ranks_per_node=most,
        intra=Link(latency_s=0, bytes_per_s=1e12),
        flops_per_s=alone.flops_per_s,
        memory_bytes_per_s=alone.memory_bytes_per_s,
        forward_s=alone.forward_s,
        backward_s=alone.backward_s,
        processors=processors,
    )
    kept = {world.ranks: bare.share(world.ranks) for world in worlds}
    several = [world for world in worlds if world.ranks > 1]
    if not several:
        return bare
    speed = {c: fmean(world.bytes_per_s[c] / kept[world.ranks] for world in several) for c in _COLLECTIVES}
    latency = {world.ranks: fmean(world.latency_s.values()) for world in several}
    fewest = min(latency)
    message = max(0.0, (latency[most] - latency[fewest]) / (most - fewest)) if most > fewest else 0.0
    link = Link(
        latency_s=max(0.0, latency[fewest] - (fewest - 2) * message),
        message_s=message,
        bytes_per_s=speed["all_to_all"],
    )
    efficiency = {c: speed[c] / speed["all_to_all"] for c in _COLLECTIVES}
    return bare.model_copy(update={"intra": link, "efficiency": efficiency})


def best_of(first: Measured, second: Measured) -> Measured:
    """The faster of each, of the same number of ranks: what others do on a machine only makes it slower."""
    return Measured(
        ranks=first.ranks,
        flops_per_s=max(first.flops_per_s, second.flops_per_s),
        memory_bytes_per_s=max(first.memory_bytes_per_s, second.memory_bytes_per_s),
        forward_s=min(first.forward_s, second.forward_s),
        backward_s=min(first.backward_s, second.backward_s),
        latency_s={c: min(value, second.latency_s[c]) for c, value in first.latency_s.items()},
        bytes_per_s={c: max(value, second.bytes_per_s[c]) for c, value in first.bytes_per_s.items()},
    )


def measure_here(group: dist.ProcessGroup, device_type: str, repeats: int = 15) -> Measured:
    """What the ranks of a group find; a collective, with the same answer on all of them."""
    device = torch.device(device_type)
    slowest = partial(_slowest, group=group, device=device, repeats=repeats)
    forward_s, backward_s = _bare_layer(device, slowest)
    found = Measured(
        ranks=group.size(),
        flops_per_s=6 * _EXPERTS * _ROWS * _WIDTH * _EXPERT_WIDTH / slowest(_mlp(device)),
        memory_bytes_per_s=_rows_bytes() / slowest(_rows(device)),
        forward_s=forward_s,
        backward_s=backward_s,
    )
    if group.size() == 1:
        return found
    speeds = measure(group, device=device, repeats=repeats)
    lines: dict[Collective, Line] = {
        "all_to_all": speeds.all_to_all,
        "all_gather": speeds.all_gather,
        "reduce_scatter": speeds.reduce_scatter,
        "all_reduce": _all_reduce(group, device, repeats),
    }
    return found.model_copy(
        update={
            "latency_s": {c: line.latency_s for c, line in lines.items()},
            "bytes_per_s": {c: line.bytes_per_s for c, line in lines.items()},
        }
    )


def shortest(run: Callable[[], object], device: torch.device, repeats: int = 15) -> float:
    """Seconds of the fastest of several calls, after two that warm up."""
    return min([_seconds(run, device) for _ in range(repeats + 2)][2:])


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    _finish(device)
    started = time.perf_counter()
    run()
    _finish(device)
    return time.perf_counter() - started


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _slowest(run: Callable[[], object], *, group: dist.ProcessGroup, device: torch.device, repeats: int) -> float:
    """Seconds of a call while all ranks make it: in the shortest of several rounds, of the slowest rank in each."""

    def agreed(seconds: float) -> float:
        told = torch.tensor(seconds, dtype=torch.float64, device=device)
        dist.all_reduce(told, op=dist.ReduceOp.MAX, group=group)
        return float(told)

    calls = max(1, round(_ROUND_S / agreed(shortest(run, device, 1))))

    def several() -> None:
        for _ in range(calls):
            run()

    rounds = []
    for _ in range(repeats):
        dist.barrier(group)
        rounds.append(agreed(_seconds(several, device)) / calls)
    return min(rounds)


def _mlp(device: torch.device) -> Callable[[], object]:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    x_RD = torch.randn(_EXPERTS * _ROWS, _WIDTH, device=device, dtype=dtype)
    up_eFD = torch.randn(_EXPERTS, 2 * _EXPERT_WIDTH, _WIDTH, device=device, dtype=dtype)
    down_eDF = torch.randn(_EXPERTS, _WIDTH, _EXPERT_WIDTH, device=device, dtype=dtype)
    load_e = torch.full((_EXPERTS,), _ROWS, device=device)
    return lambda: expert_mlp(x_RD, up_eFD, down_eDF, load_e, "swiglu")


def _rows(device: torch.device) -> Callable[[], object]:
    """Rows there and back, and their gradients, around experts that do nothing."""
    gating = Gating.softmax(_EXPERTS * _SLOTS, _SLOTS)
    assignment = TopKRouter(gating).to(device)(torch.randn(_TOKENS, gating.num_experts, device=device))
    plan, local = make_plan(assignment), LocalDispatcher()
    x_TD = torch.randn(_TOKENS, _WIDTH, device=device, requires_grad=True)
    weights_TK = assignment.weights.detach().requires_grad_()
    slope_TD = torch.randn(_TOKENS, _WIDTH, device=device)

    def run() -> None:
        x_TD.grad = weights_TK.grad = None
        arrival = local.dispatch(x_TD, plan).wait()
        local.combine(arrival.x_RD, arrival, weights_TK).wait().backward(slope_TD)  # type: ignore[no-untyped-call]

    return run


def _rows_bytes() -> float:
    """What moerouters/planning/stages.py counts for that: tokens and rows in float32."""
    tokens, rows = 4.0 * _TOKENS * _WIDTH, 4.0 * _TOKENS * _SLOTS * _WIDTH
    return (tokens + rows) + (rows + tokens) + (tokens + 2 * rows) + (rows + tokens)


def _bare_layer(device: torch.device, slowest: Callable[[Callable[[], object]], float]) -> tuple[float, float]:
    """Seconds of forward and of backward with one token, of a layer too small for arithmetic to matter."""
    layer = MoELayer(TopKRouter(Gating.softmax(4, 2)), hidden_size=8, expert_size=8).to(device)
    x_TD = torch.randn(1, 8, device=device)

    def both() -> None:
        layer(x_TD).hidden.sum().backward()

    forward_s = slowest(lambda: layer(x_TD))
    return forward_s, max(slowest(both) - forward_s, 0.0)


def _all_reduce(group: dist.ProcessGroup, device: torch.device, repeats: int) -> Line:
    """Of n numbers each rank sends 2 (p - 1) / p * n, if it is done as a reduce_scatter and an all_gather."""
    site = Site(group, backend="measure")

    def exchange(n: int) -> Exchange:
        return LeaveRegion(site)

    # p * n numbers, so that 2 (p - 1) n are sent; measure_line counts half of them.
    line = measure_line(site, exchange, blocks=site.num_ranks, device=device, repeats=repeats)
    return Line(line.latency_s, 2 * line.bytes_per_s)
