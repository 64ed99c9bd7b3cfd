"""shard_experts: spread the experts of a model over the ranks of a group, and let tokens travel to them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from moerouters.dispatch.base import Dispatcher
from moerouters.dispatch.names import BACKENDS, built_in
from moerouters.dispatch.placement import LayerPlacement, PlacementMap
from moerouters.dispatch.places import Places
from moerouters.dispatch.site import Site
from moerouters.errors import ConfigError
from moerouters.fingerprint import expect_same_on_all_ranks
from moerouters.layer import MoELayer

Model = TypeVar("Model", bound=nn.Module)


def shard_experts(
    model: Model,
    group: dist.ProcessGroup | DeviceMesh,
    *,
    dispatcher: str = "auto",
    chunks: int = 1,
    placement: PlacementMap | None = None,
) -> Model:
    """Keep this rank's block of experts in every MoELayer of `model`, and bring tokens to them by `dispatcher`.

    Call it on all ranks of `group`, with the same weights on each, before the optimizer is made: expert parameters are
    replaced by this rank's part. The model is returned. group: a process group, or a mesh of one dimension, for
    `hierarchical` also of two (nodes, ranks of a node), for `mesh3d` of three with names (data, expert, model).
    dispatcher: one of the built-in back-ends or of a plug-in's; `chunks` parts of a batch travel and compute in turn.
    Under `mesh3d` expert parameters are DTensors (see `moerouters.mesh_experts`). placement: which experts are this
    rank's, by name of the layer. The router keeps its numbering; a state dict has this rank's experts in the order of
    its slots, a DistributedState names them by the router's number. A placement with replicas serves weights that do
    not train: nothing would add up the gradients of an expert's replicas.

    Gradients are those of the sum of all ranks' losses. `expert_parameters` tells which parameters must not be reduced
    over the group again. Raises ConfigError where there is nothing to shard, the group or the placement does not fit
    the experts, or ranks run different routers, experts, capacities, dispatchers or placements.
    """
    mesh = group if isinstance(group, DeviceMesh) else None
    if isinstance(group, DeviceMesh):
        group = _group_of(group, dispatcher, placement)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoELayer)}
    sharded = [name for name, layer in layers.items() if layer.dispatcher.num_ranks > 1]
    if not layers or sharded:
        raise ConfigError(
            f"shard_experts found {f'experts of {sharded[0]!r} sharded already' if layers else 'no MoELayer'}.",
            where=type(model).__name__,
            why="it splits the experts of every MoELayer, once",
            fix="pass the whole model, built as for one process",
        )
    placed = {name: None if placement is None else placement.layers.get(name) for name in layers}
    expect_same_on_all_ranks(
        {name: layer.router for name, layer in layers.items()},
        group,
        {
            name: _settings(layer) | {"dispatcher": f"{dispatcher}, chunks={chunks}", "placement": str(placed[name])}
            for name, layer in layers.items()
        },
    )
    if placement is not None:
        _expect_fit(placement, layers, group.size())
    for name, layer in layers.items():
        site = Site(group, layer=name, backend=dispatcher, mesh=mesh if mesh is not None and mesh.ndim > 1 else None)
        made = make_dispatcher(dispatcher, site)
        if site.mesh is not None and site.mesh.ndim == 3:
            from moerouters.mesh_experts import MeshExperts

            layer.experts = MeshExperts(layer.experts, site.mesh)
            layer.set_dispatcher(made, chunks=chunks)
            continue
        here, places = _home(layer, site, placed[name], replicated=made.replicated)
        for owner, own_name, parameter in _parameters(layer.experts):
            part = parameter.detach()[here].clone()  # a copy: a slice would keep all the others in memory
            setattr(owner, own_name, nn.Parameter(part, requires_grad=parameter.requires_grad))
        layer.set_dispatcher(made, chunks=chunks, places=places)
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


def _group_of(mesh: DeviceMesh, dispatcher: str, placement: PlacementMap | None) -> dist.ProcessGroup:
    """All ranks of the mesh. Raises ConfigError where the back-end cannot make anything of its dimensions."""
    dimensions = {"hierarchical": (1, 2), "mesh3d": (3,)}.get(dispatcher, (1,))
    if mesh.ndim not in dimensions or (mesh.ndim == 3 and mesh.mesh_dim_names is None):
        raise ConfigError(
            f"dispatcher '{dispatcher}' got a mesh of {mesh.ndim} dimensions.",
            where=str(mesh),
            why=f"it needs {' or '.join(map(str, dimensions))}" + (", with names" if 3 in dimensions else ""),
            fix="pass the dimension over which experts are to be spread: mesh['expert']",
        )
    if mesh.ndim == 3 and placement is not None:
        raise ConfigError(
            "experts on a mesh of three dimensions cannot be placed.",
            where=str(mesh),
            why="their weights are DTensors, in which every rank has a contiguous block of experts",
            fix="leave out the placement, or choose another dispatcher",
        )
    if mesh.ndim == 1:
        return mesh.get_group()
    everyone = dist.group.WORLD
    if everyone is not None and mesh.mesh.flatten().tolist() == list(range(everyone.size())):
        return everyone
    return mesh._flatten().get_group()


def _home(
    layer: MoELayer, site: Site, placed: LayerPlacement | None, *, replicated: bool
) -> tuple[slice | Tensor, Places | None]:
    """The experts of this rank, and the numbering that the placement gives all of them."""
    if placed is None:
        return site.experts_here(layer.router.gating.num_experts), None
    device = next(layer.experts.parameters()).device
    # Ranks with the same tokens must choose the same replicas.
    places = Places(placed, turn=0 if replicated else site.rank).to(device)
    return torch.tensor(placed.experts[site.rank], device=device), places


def _expect_fit(placement: PlacementMap, layers: Mapping[str, MoELayer], num_ranks: int) -> None:
    """Raise ConfigError unless the placement is one of these layers over as many ranks, and trains where they do."""
    where = f"placement of {len(placement.layers)} layers on {placement.ranks} ranks"
    if placement.ranks != num_ranks or placement.layers.keys() != layers.keys():
        raise ConfigError(
            f"the placement does not fit a model with the layers {', '.join(map(repr, layers))} on {num_ranks} ranks.",
            where=f"{where}: {', '.join(map(repr, placement.layers))}",
            why="it names the experts of every rank of the group, for every MoELayer",
            fix="make one with `moerouters place --ranks N`; placement.renamed(names) gives its layers other names",
        )
    for name, layer in layers.items():
        placed, num_experts = placement.layers[name], layer.router.gating.num_experts
        if placed.num_experts != num_experts:
            raise ConfigError(
                f"{placed.num_experts} experts are placed, layer '{name}' has {num_experts}.",
                where=where,
                why="every expert lives somewhere",
                fix="make a placement from the loads of this model",
            )
        if placed.replicated and any(p.requires_grad for p in layer.experts.parameters()):
            raise ConfigError(
                f"layer '{name}' would train with replicas of {placed.num_places - num_experts} experts.",
                where=where,
                why="each replica sees a part of its expert's tokens, and nothing adds up their gradients",
                fix="to serve: model.requires_grad_(False) before; to train: a placement without replicas",
            )


def _settings(layer: MoELayer) -> dict[str, str]:
    """What ranks must agree on beside the router: it decides what travels, and what a block of experts is."""
    shapes = ", ".join(f"{name} {list(p.shape)} {p.dtype}" for name, p in layer.experts.named_parameters())
    return {"experts": shapes, "capacity": f"{layer.capacity_factor} by {layer.drop_policy}"}


def _parameters(module: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    return [(part, name, p) for part in module.modules() for name, p in part.named_parameters(recurse=False)]
