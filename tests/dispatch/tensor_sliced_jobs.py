"""What the ranks of the pool do for test_tensor_sliced.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moerouters import Gating, MoELayer, RouteContext, attach, shard_experts
from moerouters.errors import ConfigError, DispatchError
from moerouters_loss_controlled.config import LossControlledConfig
from moerouters_loss_controlled.router import LossControlledRouter

from .parity import Case, forced_ids, group_of, hidden, layer_of, mesh_of, pull

GROUP = 2


def layer_with_losses(loss_mode: Any, scale: float) -> MoELayer:
    torch.manual_seed(3)
    config = LossControlledConfig(alpha=0.5 * scale, z_alpha=0.1 * scale)
    router = LossControlledRouter(Gating.softmax(8, 2), config)
    layer = MoELayer(router, hidden_size=Case.width, expert_size=6, shared_size=4, loss_mode=loss_mode)
    return layer.double()


def step_with_losses(
    rank: int | None, loss_mode: Any, scale: float = 1.0, mesh: tuple[int, ...] = ()
) -> dict[str, Tensor]:
    """Output and gradients of one step with auxiliary losses; rank None: in a single process; mesh: under mesh3d."""
    case = Case("tensor_sliced", (9, 9, 9, 9), seed=5)
    layer = layer_with_losses(loss_mode, scale)
    if rank is not None and mesh:
        shard_experts(layer, mesh_of(mesh), dispatcher="mesh3d")
    elif rank is not None:
        shard_experts(layer, group_of(case.group_size), dispatcher="tensor_sliced")
    x_TD = hidden(case, 0)
    y_TD, assignment = layer(x_TD)
    loss = (y_TD * pull(case, 0)).sum()
    if loss_mode == "collect":
        loss = loss + sum(assignment.losses.values())
    loss.backward()
    whole = {name: p.grad for name, p in layer.named_parameters() if not name.startswith("experts.")}
    return {"y": y_TD.detach(), "x": x_TD.grad} | whole


def attached(rank: int) -> tuple[str, int, list[float]]:
    """What `attach` says without a token group; with one, the pairs it counted, and the gate's gradient of a step."""
    case = Case("tensor_sliced", (6,) * GROUP)
    layer = shard_experts(layer_of(case), group_of(GROUP), dispatcher="tensor_sliced")
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    try:
        attach(optimizer, layer)
        said = ""
    except ConfigError as error:
        said = str(error)
    columns = [dist.new_group([column, column + GROUP]) for column in range(GROUP)]
    handle = attach(optimizer, layer, token_group=columns[rank % GROUP])
    layer(hidden(case, rank // GROUP)).hidden.sum().backward()
    optimizer.step()
    return said, int(handle.loads[""].sum()), layer.gate.weight.detach().reshape(-1).tolist()


def collectives(rank: int) -> tuple[list[str], list[str]]:
    """What forward and backward send that is made of floats."""
    case = Case("tensor_sliced", (6, 6, 6, 6), shared=True)
    layer = shard_experts(layer_of(case), group_of(4), dispatcher="tensor_sliced")
    sent: list[str] = []
    all_reduce = dist.all_reduce

    def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(f"{tensor.dtype} {list(tensor.shape)}".removeprefix("torch."))
        return all_reduce(tensor, *args, **kwargs)

    x_TD = hidden(case, 0)
    dist.all_reduce = counting
    try:
        y_TD = layer(x_TD, RouteContext(forced_ids_TK=forced_ids(case, 0))).hidden
        forward = list(sent)
        y_TD.sum().backward()
    finally:
        dist.all_reduce = all_reduce
    return forward, sent[len(forward) :]


def disagreeing(rank: int, what: str, mesh: tuple[int, ...] = ()) -> str:
    """The error of a step in which the last rank of the group has something of its own; mesh: under mesh3d."""
    case = Case("mesh3d" if mesh else "tensor_sliced", (6, 6, 6, 6), mesh=mesh)
    layer = shard_experts(layer_of(case), mesh_of(mesh) if mesh else group_of(4), dispatcher=case.dispatcher)
    last = rank == 3
    if what == "tokens" and last:
        case = replace(case, tokens=(5, 5, 5, 5))
    ids_TK = forced_ids(case, 1 if what == "experts" and last else 0)
    x_TD = hidden(case, 0)
    if what == "dtype" and last:
        x_TD, layer = x_TD.bfloat16(), layer.bfloat16()
    try:
        layer(x_TD, RouteContext(forced_ids_TK=ids_TK))
    except DispatchError as error:
        return str(error)
    return ""
