"""shard_experts: spread the experts of a model over the ranks of a group, and let tokens travel to them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from moerouters.dispatch.base import Dispatcher
from moerouters.dispatch.names import BACKENDS, built_in
from moerouters.dispatch.site import Site
from moerouters.errors import ConfigError
from moerouters.fingerprint import expect_same_on_all_ranks
from moerouters.layer import MoELayer

Model = TypeVar("Model", bound=nn.Module)


def shard_experts(
    model: Model, group: dist.ProcessGroup | DeviceMesh, *, dispatcher: str = "auto", chunks: int = 1
) -> Model:
    """Keep this rank's block of experts in every MoELayer of `model`, and bring tokens to them by `dispatcher`.

    Call it on all ranks of `group` (a process group or a mesh of one dimension), with the same weights on each, before
    the optimizer is made: expert parameters are replaced by this rank's part. The model is returned. dispatcher: one
    of the built-in back-ends or of a plug-in's; `chunks` parts of a batch travel and compute in turn.

    Gradients are those of the sum of all ranks' losses. `expert_parameters` tells which parameters must not be reduced
    over the group again. Raises ConfigError where there is nothing to shard, the group does not fit the number of
    experts, or ranks run different routers, experts, capacities or dispatchers.
    """
    if isinstance(group, DeviceMesh):
        group = group.get_group()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoELayer)}
    sharded = [name for name, layer in layers.items() if layer.dispatcher.num_ranks > 1]
    if not layers or sharded:
        raise ConfigError(
            f"shard_experts found {f'experts of {sharded[0]!r} sharded already' if layers else 'no MoELayer'}.",
            where=type(model).__name__,
            why="it splits the experts of every MoELayer, once",
            fix="pass the whole model, built as for one process",
        )
    expect_same_on_all_ranks(
        {name: layer.router for name, layer in layers.items()},
        group,
        {name: _settings(layer) | {"dispatcher": f"{dispatcher}, chunks={chunks}"} for name, layer in layers.items()},
    )
    for name, layer in layers.items():
        site = Site(group, layer=name, backend=dispatcher)
        here = site.experts_here(layer.router.gating.num_experts)
        made = make_dispatcher(dispatcher, site)
        for owner, own_name, parameter in _parameters(layer.experts):
            part = parameter.detach()[here].clone()  # a copy: a slice would keep all the others in memory
            setattr(owner, own_name, nn.Parameter(part, requires_grad=parameter.requires_grad))
        layer.set_dispatcher(made, chunks=chunks)
    return model


def expert_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that differ between the ranks of their group: those of sharded experts."""
    for module in model.modules():
        if isinstance(module, MoELayer) and module.dispatcher.num_ranks > 1:
            yield from module.experts.parameters()


def make_dispatcher(name: str, site: Site) -> Dispatcher:
    """The back-end of that name, built in or of a plug-in that the run uses. Raises ConfigError for another."""
    if name in BACKENDS:
        return built_in(name, site)
    from moerouters.registry import dispatchers

    offered: Any = dispatchers()
    if name in offered:
        made: Dispatcher = offered[name].factory(site=site)
        return made
    raise ConfigError(
        f"there is no dispatcher '{name}'.",
        why=f"built in are {', '.join(sorted(BACKENDS))}"
        + (f"; plug-ins in use offer {', '.join(sorted(offered))}" if offered else ""),
        fix="choose one of these; a plug-in's is offered once a router of the same plug-in has been named",
    )


def _settings(layer: MoELayer) -> dict[str, str]:
    """What ranks must agree on beside the router: it decides what travels, and what a block of experts is."""
    shapes = ", ".join(f"{name} {list(p.shape)} {p.dtype}" for name, p in layer.experts.named_parameters())
    return {"experts": shapes, "capacity": f"{layer.capacity_factor} by {layer.drop_policy}"}


def _parameters(module: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    return [(part, name, p) for part in module.modules() for name, p in part.named_parameters(recurse=False)]
