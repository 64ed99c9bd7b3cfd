"""Stages with MoE layers for the tests of the pipeline's runtime: their training, on several ranks and on one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from moerouters import Gating, MoELayer, attach, shard_experts
from moerouters.kernels import expert_mlp_cpu
from moerouters.pipeline import Schedule
from moerouters.pipeline.runtime import Pipeline
from moerouters.pipeline.torch_engine import TorchPipeline
from moerouters.sharding import expert_parameters
from moerouters_loss_controlled.config import LossControlledConfig
from moerouters_loss_controlled.router import LossControlledRouter
from moerouters_loss_free.router import LossFreeRouter

WIDTH, E, TOKENS, STEPS = 6, 8, 12, 2
"""TOKENS: of a microbatch."""


class Block(nn.Module):
    """A stage."""

    def __init__(self, stage: int, *, loss_free: bool = False) -> None:
        super().__init__()
        torch.manual_seed(10 + stage)
        gating = Gating.softmax(E, 2)
        config = LossControlledConfig(alpha=0.5, z_alpha=0.1)
        router = LossFreeRouter(gating) if loss_free or stage % 2 else LossControlledRouter(gating, config)
        self.norm = nn.LayerNorm(WIDTH)
        self.moe = MoELayer(router, hidden_size=WIDTH, expert_size=4, shared_size=4)

    def forward(self, x_TD: Tensor) -> Tensor:
        return x_TD + self.moe(self.norm(x_TD)).hidden


@dataclass(frozen=True)
class Trained:
    """What some steps left behind. Names begin with the stage."""

    losses: list[Tensor]
    weights: dict[str, Tensor]
    state: dict[str, Tensor]
    """Of routers."""
    loads: dict[str, Tensor]
    products: int
    """Matrix products of experts."""


def batch(M: int, step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    shape = (M * TOKENS, WIDTH)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name in ("input", "target")}


def loss_of(output_TD: Tensor, target_TD: Tensor) -> Tensor:
    return ((output_TD - target_TD) ** 2).mean()


def alone(num_stages: int, M: int, *, loss_free: bool = False) -> Trained:
    """One process; microbatches one after the other."""
    stages = nn.ModuleDict({str(stage): Block(stage, loss_free=loss_free).double() for stage in range(num_stages)})
    optimizer = torch.optim.SGD(stages.parameters(), lr=0.1)
    handle = attach(optimizer, stages, loss_mode="inject")
    losses = []
    with counted_products() as made:
        for step in range(STEPS):
            handle.scale_losses(accumulation_steps=M)
            found = []
            for x_TD, target_TD in zip(*(part.tensor_split(M) for part in batch(M, step).values()), strict=True):
                for stage in stages.values():
                    x_TD = stage(x_TD)
                loss = loss_of(x_TD, target_TD)
                (loss / M).backward()
                found.append(loss.detach())
            losses.append(torch.stack(found))
            optimizer.step()
            optimizer.zero_grad()
    return _trained(losses, stages, handle.loads, made[0])


def piped(rank: int, schedule: Schedule, tensor_ranks: int = 1, engine: str = "ours") -> Trained:
    """On all four ranks: as many pipelines side by side as tensor_ranks, which share the experts of each stage."""
    mesh = mesh_of(schedule.num_ranks, tensor_ranks)

    def build(stage: int) -> nn.Module:
        block = Block(stage).double()
        if tensor_ranks > 1:
            shard_experts(block, mesh["tp"].get_group(), dispatcher="tensor_sliced")
        return block

    M = schedule.num_microbatches
    kind: Any = TorchPipeline if engine == "torch" else Pipeline
    pipeline = kind(schedule, build, loss_of, group=mesh["pp"].get_group())
    optimizer = torch.optim.SGD(pipeline.stages.parameters(), lr=0.1)
    handle = attach(optimizer, pipeline.stages, loss_mode="inject", token_group=mesh["dp"].get_group())
    losses = []
    with counted_products() as made:
        for step in range(STEPS):
            handle.scale_losses(accumulation_steps=M)
            found = pipeline.step(**batch(M, step))
            losses += [] if found is None else [found]
            optimizer.step()
            optimizer.zero_grad()
    return _trained(losses, pipeline.stages, handle.loads, made[0])


def spread(rank: int, schedule: Schedule, dispatcher: str) -> tuple[list[Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Two pipelines of other tokens, whose ranks share the experts of a stage: losses, weights and loads by name.

    Routers are loss-free: an auxiliary loss is one of a rank's own tokens.
    """
    group = mesh_of(schedule.num_ranks, 2)["tp"].get_group()
    pair = mesh_of_experts(schedule.num_ranks)

    def build(stage: int) -> nn.Module:
        block = Block(stage, loss_free=True).double()
        return shard_experts(block, pair if dispatcher == "mesh3d" else group, dispatcher=dispatcher)

    M, place = schedule.num_microbatches, group.rank()
    pipeline = Pipeline(schedule, build, loss_of, group=mesh_of(schedule.num_ranks, 2)["pp"].get_group())
    optimizer = torch.optim.SGD(pipeline.stages.parameters(), lr=0.1, foreach=False)
    handle = attach(optimizer, pipeline.stages, loss_mode="inject", token_group=group)
    own = {id(parameter) for parameter in expert_parameters(pipeline.stages)}
    losses = []
    for step in range(STEPS):
        parts = {name: part.unflatten(0, (M, -1))[:, place::2].flatten(0, 1) for name, part in batch(M, step).items()}
        found = pipeline.step(**parts)
        if found is not None:
            dist.all_reduce(found, group=group)
            losses.append(found / 2)
        for parameter in pipeline.stages.parameters():
            assert parameter.grad is not None
            if id(parameter) not in own:
                dist.all_reduce(parameter.grad, group=group)
            parameter.grad /= 2  # the mean of both ranks' means
        optimizer.step()
        optimizer.zero_grad()
    weights = {
        name: _whole(weight.detach(), id(weight) in own, group) for name, weight in pipeline.stages.named_parameters()
    }
    return losses, weights, dict(handle.loads)


def _whole(weight: Tensor, own: bool, group: dist.ProcessGroup) -> Tensor:
    if not own:
        return weight
    if isinstance(weight, DTensor):
        return weight.full_tensor()
    parts = [torch.empty_like(weight) for _ in range(group.size())]
    dist.all_gather(parts, weight.contiguous(), group=group)
    return torch.cat(parts)


def expect_same(found: list[Trained], right: Trained, *, experts_in: int = 1) -> None:
    """experts_in: ranks that hold the experts of a layer, one part each."""
    losses = next(each.losses for each in reversed(found) if each.losses)
    torch.testing.assert_close(torch.stack(losses), torch.stack(right.losses), rtol=1e-10, atol=1e-10)
    for name, weight in right.weights.items():
        copies = [each.weights[name] for each in found if name in each.weights]
        whole = [torch.cat(copies)] if ".experts." in name and experts_in > 1 else copies
        assert len(copies) == experts_in
        for copy in whole:
            torch.testing.assert_close(copy, weight, rtol=1e-10, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")
    assert any("expert_bias_E" in name and bool(state.any()) for name, state in right.state.items())
    for name, state in right.state.items():
        for each in found:
            assert name not in each.state or torch.equal(each.state[name], state), name
    for name, load_E in right.loads.items():
        for each in found:
            assert name not in each.loads or torch.equal(each.loads[name], load_E), name
    assert right.loads.keys() == {name for each in found for name in each.loads}


@cache
def mesh_of(pipeline_ranks: int, tensor_ranks: int) -> DeviceMesh:
    return init_device_mesh("cpu", (1, pipeline_ranks, tensor_ranks), mesh_dim_names=("dp", "pp", "tp"))


@cache
def mesh_of_experts(pipeline_ranks: int) -> DeviceMesh:
    """Of two ranks of a stage, as mesh3d wants it."""
    names = ("pp", "data", "expert", "model")
    return init_device_mesh("cpu", (pipeline_ranks, 1, 2, 1), mesh_dim_names=names)["data", "expert", "model"]


@contextmanager
def counted_products() -> Iterator[list[int]]:
    original, made = expert_mlp_cpu.multiply, [0]

    def counting(*args: Any, **kwargs: Any) -> Tensor:
        made[0] += 1
        return original(*args, **kwargs)

    expert_mlp_cpu.multiply = counting
    try:
        yield made
    finally:
        expert_mlp_cpu.multiply = original


def _trained(losses: list[Tensor], stages: nn.ModuleDict, loads: Mapping[str, Tensor], products: int) -> Trained:
    weights = {name: parameter.detach() for name, parameter in stages.named_parameters()}
    state = {name: buffer for name, buffer in stages.named_buffers() if ".router." in name}
    return Trained(losses, weights, state, dict(loads), products)
