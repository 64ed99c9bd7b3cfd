"""What the ranks of the pool do for test_hierarchical.py and test_mesh3d.py."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from moerouters import Gating, MoELayer, attach, shard_experts
from moerouters.builtin import TopKRouter
from moerouters.dispatch.hierarchical import HierarchicalDispatcher
from moerouters.dispatch.placement import LayerPlacement, PlacementMap
from moerouters.dispatch.site import Site
from moerouters.errors import MoeroutersError

from .parity import Case, across, group_of, hidden, layer_of, mesh_of, step

WIDTH, E, K, TOKENS, NODE = 64, 8, 4, 50, 2


@contextmanager
def counted() -> Iterator[Counter[tuple[str, int]]]:
    """Bytes that this rank sends in an all-to-all, by kind (`rows`, `rest`) and rank of the job."""
    sent: Counter[tuple[str, int]] = Counter()
    original = dist.all_to_all_single

    def counting(output: Tensor, given: Tensor, came: Any = None, went: Any = None, *, group: Any, **more: Any) -> Any:
        ranks = dist.get_process_group_ranks(group)
        kind = "rows" if given.dim() == 2 and given.is_floating_point() else "rest"
        for rank, part in zip(ranks, given.split(went or len(given) // len(ranks)), strict=True):
            sent[kind, rank] += part.numel() * part.element_size()
        return original(output, given, came, went, group=group, **more)

    with patch.object(dist, "all_to_all_single", counting):
        yield sent


def traffic(rank: int, dispatcher: str, shape: tuple[int, ...]) -> dict[str, int]:
    """Of forward and backward of one layer: bytes of rows and of all else to ranks of the other node and along it, and
    how often tokens chose an expert, a rank, the other node."""
    torch.manual_seed(0)
    layer = MoELayer(TopKRouter(Gating.softmax(E, K)), hidden_size=WIDTH, expert_size=4)
    shard_experts(layer, mesh_of(shape) if shape else group_of(4), dispatcher=dispatcher)
    source = rank - rank % shape[2] if len(shape) == 3 else rank
    x_TD = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(source), requires_grad=True)
    with counted() as sent:
        y_TD, assignment = layer(x_TD)
        y_TD.sum().backward()
    node = rank // NODE
    nodes_TK = assignment.expert_ids_TK // (E // NODE)
    found = {
        f"{kind} {where}": sum(
            size for (k, r), size in sent.items() if k == kind and (r // NODE != node) == (where == "away")
        )
        for kind in ("rows", "rest")
        for where in ("away", "home")
    }
    return found | {
        "pairs": int((nodes_TK != node).sum()),
        "tokens": int((nodes_TK != node).any(dim=1).sum()),
    }


def from_environment(rank: int, per_node: str, size: int) -> dict[str, Tensor] | str:
    """A step in groups of `size` ranks, whose nodes are told by LOCAL_WORLD_SIZE; or what is said of it."""
    case = Case("hierarchical", (5, 3, 0, 9)[:size])
    with patch.dict(os.environ):
        os.environ.pop("LOCAL_WORLD_SIZE", None)
        if per_node:
            os.environ["LOCAL_WORLD_SIZE"] = per_node
        try:
            return step(rank, case)
        except MoeroutersError as error:
            return str(error)


def node_size(rank: int, size: int) -> str:
    """What is said of an argument; the groups that layers then share."""
    world = group_of(4)
    try:
        first, second = (HierarchicalDispatcher(Site(world, backend="hierarchical"), node_size=size) for _ in range(2))
    except MoeroutersError as error:
        return str(error)
    assert first.between.group is second.between.group and first.inside.group is second.inside.group
    inside = dist.get_process_group_ranks(first.inside.group)
    return f"{first.between} {dist.get_process_group_ranks(first.between.group)} {inside}"


def attached(rank: int, shape: tuple[int, ...]) -> tuple[str, int]:
    """What `attach` says without a token group; with one, where that is needed, the pairs it counted."""
    case = Case("mesh3d", (6,) * 4, mesh=shape)
    layer = shard_experts(layer_of(case), mesh_of(shape), dispatcher="mesh3d")
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    said = ""
    try:
        handle = attach(optimizer, layer)
    except MoeroutersError as error:
        said = str(error)
        handle = attach(optimizer, layer, token_group=across())
    layer(hidden(case, case.source(rank))).hidden.sum().backward()
    optimizer.step()
    return said, int(handle.loads[""].sum())


def refused(rank: int, dispatcher: str, shape: tuple[int, ...], changes: dict[str, int]) -> str:
    """What shard_experts says of a mesh."""
    settings = {"experts": 8, "hidden_size": 8, "expert_size": 4, "placed": 0} | changes
    router = TopKRouter(Gating.softmax(settings["experts"], 2))
    layer = MoELayer(router, hidden_size=settings["hidden_size"], expert_size=settings["expert_size"])
    contiguous = PlacementMap(ranks=2, layers={"": LayerPlacement.contiguous(8, 2)})
    placement = contiguous if settings["placed"] else None
    try:
        ranks = mesh_of(shape) if shape else group_of(4)
        shard_experts(layer, ranks, dispatcher=dispatcher, placement=placement)
    except MoeroutersError as error:
        return str(error)
    return "nothing"
