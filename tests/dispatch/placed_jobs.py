"""What the ranks of test_placement.py do: a module that they can import."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from moerouters import MoELayer, RouteContext, shard_experts
from moerouters.dispatch.placement import PlacementMap
from moerouters.errors import ConfigError

from .parity import Case, differentiate, forced_ids, found, group_of, hidden, layer_of, mesh_of, pull, valid


def steps(rank: int, cases: list[tuple[Case, PlacementMap]]) -> list[dict[str, Tensor]]:
    """Of each case, outputs and gradients of a placed layer on this rank."""
    return [_step(case, placement) for case, placement in cases]


def _step(case: Case, placement: PlacementMap) -> dict[str, Tensor]:
    group = group_of(case.group_size)
    member = case.source(group.rank())
    trains = not placement.replicated
    layer = layer_of(case).requires_grad_(trains)
    ranks = mesh_of(case.mesh) if case.mesh else group
    shard_experts(layer, ranks, dispatcher=case.dispatcher, chunks=case.chunks, placement=placement)
    valid_T = valid(case, member)
    x_TD = hidden(case, member).detach().masked_fill(~valid_T.unsqueeze(1), torch.nan).requires_grad_()
    forced_ids_TK = forced_ids(case, member) if case.kind == "slots" else None
    ctx = RouteContext(forced_ids_TK=forced_ids_TK, valid_T=valid_T if case.padding else None)
    y_TD = layer(x_TD, ctx).hidden
    differentiate((y_TD.double() * pull(case, member)).sum(), case)
    return found(layer, x_TD, y_TD, group)


def received(rank: int, case: Case, placement: PlacementMap) -> list[int]:
    """Rows that arrive at each slot of this rank."""
    group = group_of(case.group_size)
    layer = shard_experts(layer_of(case).requires_grad_(False), group, dispatcher=case.dispatcher, placement=placement)
    rows: list[Tensor] = []
    layer.experts.register_forward_pre_hook(lambda module, args: rows.append(args[1].clone()))
    layer(hidden(case, group.rank()), RouteContext(forced_ids_TK=forced_ids(case, group.rank())))
    counted: list[int] = torch.stack(rows).sum(dim=0).tolist()
    return counted


def refused(rank: int, case: Case, placements: list[PlacementMap], trains: bool) -> str:
    """What shard_experts says of the placement with this rank's number."""
    layer: MoELayer = layer_of(case).requires_grad_(trains)
    try:
        shard_experts(layer, dist.group.WORLD, dispatcher=case.dispatcher, placement=placements[rank])
    except ConfigError as error:
        return str(error)
    return ""
