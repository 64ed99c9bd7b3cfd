"""What ranks of test_failures.py do: three train one step, and rank 1 misbehaves. Children import this module."""

from __future__ import annotations

import os
import sys
import time
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moerouters import Assignment, Gating, MoELayer, build, shard_experts
from moerouters.builtin import TopKRouter
from moerouters.dispatch.all_to_all import AllToAllDispatcher
from moerouters.dispatch.run import through_experts
from moerouters.dispatch.site import Site
from moerouters.errors import MoeroutersError
from moerouters.sharding import make_dispatcher
from support.faults import NAP_S, join, misbehave

from .parity import mesh_of

RANKS, BAD = 3, 1
TIMEOUT_S = 5
"""Of the process group that tokens travel in."""
WIDTH, E = 4, 6
MESHES = {"hierarchical": (2, 2), "mesh3d": (1, 2, 2)}
"""Of the ranks of the pool."""
LAYER = "blocks.0.moe"


class Model(nn.Module):
    """One MoE layer under the name LAYER, with hooks at which a rank can misbehave."""

    def __init__(self, group: dist.ProcessGroup | DeviceMesh, dispatcher: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = MoELayer(TopKRouter(Gating.softmax(E, 2)), hidden_size=6, expert_size=3, capacity_factor=float(E))
        self.blocks = nn.ModuleList([nn.ModuleDict({"moe": layer})])
        shard_experts(self, group, dispatcher=dispatcher)
        self.layer = layer

    def forward(self, x_TD: Tensor) -> Tensor:
        hidden: Tensor = self.layer(x_TD).hidden
        return hidden


def train(rank: int, folder: str, dispatcher: str, fault: str) -> None:
    """One step with the fault on rank BAD. What is raised leaves the process, as in a user's script."""
    group = join(rank, folder, ranks=RANKS, patience_s=90, timeout_s=TIMEOUT_S)
    os.environ["LOCAL_WORLD_SIZE"] = "1"  # each rank is a node
    ranks: dist.ProcessGroup | DeviceMesh = group
    if dispatcher == "mesh3d":
        ranks = init_device_mesh("cpu", (1, 1, RANKS), mesh_dim_names=("data", "expert", "model"))
    model = Model(ranks, dispatcher)
    x_TD = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    if rank == BAD:
        _arm(model, fault)
    began = time.monotonic()
    try:
        y_TD = model(x_TD)
        if (rank, fault) == (BAD, "forgets the backward"):
            time.sleep(NAP_S)
        y_TD.sum().backward()
    finally:
        print(f"after {time.monotonic() - began:.1f} s", file=sys.stderr)


def _arm(model: Model, fault: str) -> None:
    what, _, when = fault.partition(" in ")
    if when == "experts":
        model.layer.experts.register_forward_pre_hook(lambda *_: misbehave(what))
    elif when == "backward":
        model.layer.experts.register_full_backward_pre_hook(lambda *_: misbehave(what))
    elif fault == "gives wide rows":
        model.layer.experts.register_forward_hook(lambda module, args, y_RD: torch.cat([y_RD, y_RD], dim=1))
    elif fault == "leaves early":
        sys.exit(7)


# On the pool, whose ranks live on: what every rank raises by itself, and can catch.


def assignment(tokens: int) -> Assignment:
    route = TopKRouter(Gating.softmax(4, 2)).eval()
    made: Assignment = route(torch.randn(tokens, 4, generator=torch.Generator().manual_seed(0)))
    return made


def disagree(rank: int, dispatcher: str, about: str) -> str:
    """The message that this rank gets when rank 1 sends rows of another form."""
    world = dist.group.WORLD
    assert world is not None
    mesh = mesh_of(MESHES[dispatcher]) if dispatcher in MESHES else None
    site = Site(world, layer=LAYER, backend=dispatcher, mesh=mesh)
    odd = rank == BAD
    width = 6 if odd and about == "width" else WIDTH
    dtype = torch.float64 if odd and about == "dtype" else torch.float32
    x_TD = torch.ones(3, width, dtype=dtype)
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=odd and about == "autocast"):
            through_experts(make_dispatcher(dispatcher, site), x_TD, assignment(3), lambda x, load: x, capacity=3)
    except MoeroutersError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def results_of_another_width(rank: int) -> str:
    """Every rank's experts give rows that are too wide."""
    assert dist.group.WORLD is not None
    site = Site(dist.group.WORLD, layer=LAYER, backend="all_to_all")
    try:
        through_experts(AllToAllDispatcher(site), torch.ones(3, 4), assignment(3), lambda x, load: x.repeat(1, 2))
    except MoeroutersError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def unlike(rank: int, what: str) -> str:
    """The message of shard_experts where rank 2 has something else."""
    odd = rank == 2
    router = build("topk", Gating.softmax(8, 1 if odd and what == "gating" else 2))
    layer = MoELayer(router, hidden_size=4, expert_size=5 if odd and what == "experts" else 3)
    dispatcher = "all_gather" if odd and what == "dispatcher" else "all_to_all"
    version = "moerouters 0.0.9" if odd and what == "version" else "moerouters 0.1.0"
    assert dist.group.WORLD is not None
    try:
        with patch("moerouters.fingerprint._version", lambda package: version):
            shard_experts(nn.ModuleDict({"moe": layer}), dist.group.WORLD, dispatcher=dispatcher)
    except MoeroutersError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"
