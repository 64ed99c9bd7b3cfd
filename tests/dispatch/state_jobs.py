"""What the ranks of the pool do for test_distributed_state.py: train, save, load, train on."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from moerouters import Gating, MoELayer, attach, build, expert_parameters, shard_experts
from moerouters.dispatch.placement import LayerPlacement, PlacementMap
from moerouters.distributed_state import DistributedState

from .parity import across, mesh_of

WIDTH, E, SOURCES, TOKENS = 8, 8, 4, 6


@dataclass(frozen=True)
class Layout:
    """Where a model lies."""

    dispatcher: str = "local"
    mesh: tuple[int, ...] = ()
    """(data, expert) or (data, expert, model); more than one along data: under fully_shard. Empty: one process."""
    placed: bool = False

    @property
    def slices(self) -> int:
        return self.mesh[2] if len(self.mesh) == 3 else 1


class Model(nn.Module):
    """A dense layer and an MoE layer whose router learns a bias."""

    def __init__(self, activation: Any) -> None:
        super().__init__()
        self.dense = nn.Linear(WIDTH, WIDTH)
        router = build("loss-free", Gating.softmax(E, 2))
        self.moe = MoELayer(router, hidden_size=WIDTH, expert_size=4, shared_size=4, activation=activation)

    def forward(self, x_TD: Tensor) -> Tensor:
        x_TD = x_TD + torch.tanh(self.dense(x_TD))
        hidden: Tensor = self.moe(x_TD).hidden
        return x_TD + hidden


def train(
    rank: int, layout: Layout, steps: int, load: str | None, save: str | None, activation: str = "swiglu"
) -> list[float]:
    """The loss over all sources at each step. load, save: folders of checkpoints. Without a load, weights are drawn."""
    with torch.random.fork_rng():
        torch.manual_seed(1 if load else 0)  # what is loaded differs from what is there
        model = Model(activation)
    with patch.dict(os.environ, LOCAL_WORLD_SIZE="2"):  # for hierarchical
        optimizer, token_group = _spread(model, layout)
    handle = attach(optimizer, model, token_group=token_group)
    if load is not None:
        _checkpoint(dcp.load, model, optimizer, load)
    losses = [_step(model, optimizer, layout, rank, index + (2 if load else 0)) for index in range(steps)]
    if save is not None:
        _checkpoint(dcp.save, model, optimizer, save)
    handle.remove()
    return losses


def _spread(model: Model, layout: Layout) -> tuple[torch.optim.Optimizer, dist.ProcessGroup | None]:
    token_group = across() if layout.slices == 2 else None
    if layout.mesh:
        mesh = mesh_of(layout.mesh)
        data, expert, *_ = mesh.mesh_dim_names or ()
        if layout.slices > 1 or layout.dispatcher == "mesh3d":
            shard_experts(model, mesh, dispatcher=layout.dispatcher)
        elif layout.dispatcher != "local":
            placement = None
            if layout.placed:
                turned = LayerPlacement.of_places([*range(3, E), 0, 1, 2], layout.mesh[1])
                placement = PlacementMap(ranks=layout.mesh[1], layers={"moe": turned})
            shard_experts(model, mesh[expert], dispatcher=layout.dispatcher, placement=placement)
        if layout.mesh[0] > 1:
            fully_shard(model.moe.experts, mesh=mesh[data])
            fully_shard(model, mesh=mesh[data] if layout.slices > 1 else mesh_of((4,)))
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.set_gradient_divide_factor(1.0)
                    module.set_force_sum_reduction_for_comms(True)
    return torch.optim.AdamW(model.parameters(), lr=1e-2), token_group


def _step(model: Model, optimizer: torch.optim.Optimizer, layout: Layout, rank: int, index: int) -> float:
    total = torch.zeros(())
    spread = SOURCES // layout.slices if layout.mesh else 1
    for source in range(rank // layout.slices if layout.mesh else 0, SOURCES, spread):
        random = torch.Generator().manual_seed(10 * index + source)
        x_TD, target_TD = torch.randn(2, TOKENS, WIDTH, generator=random)
        loss = (model(x_TD) - target_TD).square().sum() / (SOURCES * TOKENS)
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    if layout.mesh:
        _reduce(model, layout)
        dist.all_reduce(total, group=across() if layout.slices == 2 else None)
    optimizer.step()
    optimizer.zero_grad()
    return float(total)


def _reduce(model: Model, layout: Layout) -> None:
    """Sum what backward has not: gradients of what every rank has, where fully_shard does not."""
    own = {id(parameter) for parameter in expert_parameters(model)}
    for parameter in model.parameters():
        if layout.mesh[0] == 1 and id(parameter) not in own and parameter.grad is not None:
            dist.all_reduce(parameter.grad, group=across() if layout.slices == 2 else None)


def _checkpoint(how: Any, model: Model, optimizer: torch.optim.Optimizer, folder: str) -> None:
    with warnings.catch_warnings():
        # One process is meant where there is one.
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        how({"run": DistributedState(model, optimizer)}, checkpoint_id=folder)


class Hidden:
    """As much as is asked of a plug-in's dispatcher."""

    num_ranks = 2


def entries(rank: int, layout: Layout, activation: str = "swiglu") -> dict[str, list[int]]:
    """Shapes of the experts' entries on this rank, whole."""
    model = Model(activation)
    optimizer, _ = _spread(model, layout)
    return {name: list(shape) for name, shape in _shapes(DistributedState(model, optimizer).state_dict())}


def _shapes(state: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, torch.Size]]:
    for key, value in state.items():
        if isinstance(value, dict):
            yield from _shapes(value, f"{prefix}{key}/")
        elif isinstance(value, Tensor) and "experts." in prefix + key:
            yield prefix + key, value.shape
