"""The formulas held against this machine: real layers on a few ranks, and what the simulation says of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from moerouters import Gating, MoELayer, shard_experts
from moerouters.bench.shapes import Shape
from moerouters.builtin import TopKRouter
from moerouters.planning.calibrate import RANKS, shortest
from moerouters.planning.cluster import Cluster
from moerouters.planning.collectives import Group
from moerouters.planning.ranks import on_ranks
from moerouters.planning.stages import BACKENDS, Batch

COMPARED = ("all_to_all", "padded", "all_gather", "tensor_sliced")
"""Back-ends that need no second node."""
SHAPES = (
    Shape(name="few tokens", T=64, D=256, E=8, K=2, F=512, layers=1),
    Shape(name="small", T=512, D=256, E=8, K=2, F=512, layers=1),
    Shape(name="wide", T=256, D=512, E=8, K=2, F=1024, layers=1),
    Shape(name="fine", T=1024, D=256, E=16, K=4, F=128, layers=1),
)
_FACTOR = 1.5
"""Capacity of `padded`."""


class Compared(BaseModel):
    """One layer on so many ranks: measured, and simulated with the rows that its slowest rank really had."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: str
    sizes: dict[str, int]
    ranks: int
    backend: str
    imbalance: float
    """Rows of the rank with most over the mean."""
    measured_ms: tuple[float, float]
    """Forward; forward and backward. The shortest of several, of the slowest rank."""
    simulated_ms: tuple[float, float]

    @property
    def error(self) -> float:
        """Of forward and backward: simulated over measured, less 1."""
        return self.simulated_ms[1] / self.measured_ms[1] - 1


@dataclass(frozen=True)
class Timed:
    """One layer on so many ranks, as it was measured."""

    shape: Shape
    ranks: int
    backend: str
    forward_s: float
    both_s: float
    rows: float
    """Of the rank that has most."""


def time_layers(*, ranks: Sequence[int] = RANKS, shapes: Sequence[Shape] = SHAPES, device: str = "cpu") -> list[Timed]:
    """Run layers on worlds of these sizes."""
    found = []
    for world in ranks:
        backends = COMPARED if world > 1 else ("local",)
        runs = [(shape, backend) for shape in shapes for backend in backends if shape.E % world == 0]
        taken = on_ranks(measure_layers, world, runs, device, device=device)[0]
        found += [Timed(shape, world, name, *each) for (shape, name), each in zip(runs, taken, strict=True)]
    return found


def compare(cluster: Cluster, timed: Sequence[Timed], *, number_bytes: int) -> list[Compared]:
    """Simulate each of them, with the rows that its slowest rank really had."""
    found = []
    for each in timed:
        forward, backward = simulated(
            cluster, each.shape, each.backend, each.ranks, each.rows, number_bytes=number_bytes
        )
        found.append(
            Compared(
                shape=each.shape.name,
                sizes=each.shape.sizes(),
                ranks=each.ranks,
                backend=each.backend,
                imbalance=each.rows / each.shape.N,
                measured_ms=(1e3 * each.forward_s, 1e3 * each.both_s),
                simulated_ms=(1e3 * forward, 1e3 * (forward + backward)),
            )
        )
    return found


def simulated(
    cluster: Cluster, shape: Shape, backend: str, world: int, rows: float, *, number_bytes: int
) -> tuple[float, float]:
    """Seconds of forward and backward where the slowest rank has so many rows. `local` is all_to_all with nobody."""
    capacity = ceil(_FACTOR * shape.N / shape.E)
    batch = Batch(
        T=shape.T, D=shape.D, E=shape.E, K=shape.K, F=shape.F, number_bytes=number_bytes, capacity=capacity
    )  # fmt: skip
    group = Group(cluster, world)
    passes = BACKENDS["all_to_all" if backend == "local" else backend](batch, group, np.asarray(rows))
    share = cluster.share(group.here)
    host = (cluster.forward_s / share, cluster.backward_s / share)
    return float(passes[0].total) + host[0], float(passes[1].total) + host[1]


def measure_layers(
    group: dist.ProcessGroup, runs: Sequence[tuple[Shape, str]], device_type: str
) -> list[tuple[float, float, float]]:
    """For each shape and back-end: seconds of forward, of both passes, and the rows of the rank with most of them. A
    collective, with the same answer on all ranks."""
    return [_measure(group, shape, backend, torch.device(device_type)) for shape, backend in runs]


def _measure(group: dist.ProcessGroup, shape: Shape, backend: str, device: torch.device) -> tuple[float, float, float]:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    layer = MoELayer(
        TopKRouter(Gating.softmax(shape.E, shape.K)),
        hidden_size=shape.D,
        expert_size=shape.F,
        capacity_factor=_FACTOR if backend == "padded" else None,
    ).to(device, dtype)
    if backend != "local":
        shard_experts(layer, group, dispatcher=backend)
    replicated = layer.dispatcher.replicated
    torch.manual_seed(0 if replicated else 1 + group.rank())
    tokens = shape.T * (group.size() if replicated else 1)
    x_TD = torch.randn(tokens, shape.D, device=device, dtype=dtype, requires_grad=True)
    gradient_TD = torch.randn(tokens, shape.D, device=device, dtype=dtype)

    def forward() -> Tensor:
        hidden: Tensor = layer(x_TD).hidden
        return hidden

    def both() -> None:
        layer.zero_grad()  # adding to gradients would cost as much again as writing them
        x_TD.grad = None
        forward().backward(gradient_TD)  # type: ignore[no-untyped-call]

    load_E = layer(x_TD).assignment.load_E
    if not replicated:
        dist.all_reduce(load_E, group=group)
    rows = float(load_E.view(group.size(), -1).sum(dim=1).max())
    dist.barrier(group)
    times = torch.tensor([shortest(forward, device), shortest(both, device)], dtype=torch.float64, device=device)
    dist.all_reduce(times, op=dist.ReduceOp.MAX, group=group)
    forward_s, both_s = times.tolist()
    return forward_s, both_s, rows
