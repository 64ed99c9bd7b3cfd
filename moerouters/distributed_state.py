"""What torch.distributed.checkpoint saves of a model with spread experts: it loads over any other ranks, or in one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    _get_fqns,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from moerouters.errors import ConfigError
from moerouters.layer import MoELayer
from moerouters.mesh_experts import MeshExperts
from moerouters.routed import RoutedModule


class DistributedState(Stateful):
    """Weights, router state and, if given, the optimizer's state of a model, for `dcp.save` and `dcp.load`:

        dcp.save({"run": DistributedState(model, optimizer)}, checkpoint_id=folder)
        dcp.load({"run": DistributedState(model, optimizer)}, checkpoint_id=folder)

    Each expert of a MoELayer has entries of its own, `<weight>.<expert>` by the router's number: `up_eFD` as [2, F, D]
    (gelu: [1, F, D]), `down_eDF` as [D, F], DTensors where they are cut. So ranks, back-end, mesh, placement and
    fully_shard may be others when it is loaded. All else is as torch makes it. Loading writes into the model.

    Raises ConfigError where a plug-in's dispatcher does not say which rank this is, where one rank has replicas of an
    expert, or an optimizer keeps something for experts that has neither the form of the weight nor of one number.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer | None = None) -> None:
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        return self._by_expert(*self._whole())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From a dict as `state_dict` returns; `dcp.load` wrote into its tensors, which are the model's own."""
        weights, moments = self._whole()
        _copy(self._by_expert(weights, moments), state_dict)
        if self.optimizer is not None:
            groups = state_dict["optimizer"]["param_groups"]
            set_optimizer_state_dict(self.model, self.optimizer, moments | {"param_groups": groups})
        for module in self.model.modules():
            if isinstance(module, RoutedModule):
                module.learned()

    def _whole(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """As torch makes them; the tensors are those of the model and the optimizer."""
        moments = {} if self.optimizer is None else get_optimizer_state_dict(self.model, self.optimizer)
        return get_model_state_dict(self.model), moments

    def _by_expert(self, weights: Mapping[str, Any], moments: Mapping[str, Any]) -> dict[str, Any]:
        """The same tensors, those of experts one by one."""
        parts = dict(_parts(self.model))

        def split(name: str, key: str, value: Any) -> dict[str, Any]:
            return parts[name].split(key, value) if name in parts else {key: value}

        state: dict[str, Any] = {"model": {}}
        for name, value in weights.items():
            state["model"] |= split(name, name, value)
        if moments:
            kept: dict[str, dict[str, Any]] = {name: {} for name in moments["state"]}
            for name, slots in moments["state"].items():
                for key, value in slots.items():
                    kept[name] |= split(name, key, value)
            state["optimizer"] = {"state": kept, "param_groups": moments["param_groups"]}
        return state


@dataclass(frozen=True, kw_only=True)
class _Part:
    """What is here of one weight of a layer's experts."""

    experts: list[int]
    shape: torch.Size
    """Of the whole weight."""
    form: tuple[int, ...]
    """Of one expert's, as far as it is here."""
    mesh: DeviceMesh | None
    """Over which each is cut, along its second dimension."""

    def split(self, key: str, value: Any) -> dict[str, Any]:
        """Entries of the weight, or of something of its form, by expert."""
        if not isinstance(value, Tensor) or value.dim() == 0:
            return {key: value}
        if value.shape != self.shape:
            raise ConfigError(
                f"the optimizer keeps '{key}' of shape {list(value.shape)} for experts of shape {list(self.shape)}.",
                why="what belongs to which expert is told by the form of the weight",
                fix="take an optimizer that works element by element for the experts, such as AdamW",
            )
        rows = (value.to_local() if isinstance(value, DTensor) else value).detach()
        parts = {f"{key}.{expert}": row.view(self.form) for expert, row in zip(self.experts, rows, strict=True)}
        if self.mesh is None:
            return parts
        return {name: DTensor.from_local(part, self.mesh, [Shard(1)], run_check=False) for name, part in parts.items()}


def _parts(model: nn.Module) -> Iterator[tuple[str, _Part]]:
    """By name of the parameter."""
    for layer_name, layer in model.named_modules():
        if not isinstance(layer, MoELayer):
            continue
        experts, prefix = layer.experts, f"{layer_name}.experts" if layer_name else "experts"
        _, width, expert_size = experts.down_eDF.shape
        halves = 2 if experts.activation == "swiglu" else 1
        here = expert_size // experts.slices
        for name, form in (("up_eFD", (halves, here, width)), ("down_eDF", (width, here))):
            weight = getattr(experts, name)
            mesh = None
            if experts.slices > 1:
                mesh = weight.device_mesh[weight.device_mesh.mesh_dim_names[-1]]
            part = _Part(experts=_ids_here(layer, weight), shape=weight.shape, form=form, mesh=mesh)
            # Private to torch: what get_model_state_dict calls a parameter, without the names of wrappers.
            (key,) = _get_fqns(model, f"{prefix}.{name}")
            yield key, part


def _ids_here(layer: MoELayer, weight: Tensor) -> list[int]:
    """The router's numbers of the experts in a weight of this rank, which fully_shard may have cut."""
    E, ranks = layer.router.gating.num_experts, layer.dispatcher.num_ranks
    ids = torch.arange(E) if layer.places is None else layer.places.by_place.cpu()
    if ranks > 1 and not isinstance(layer.experts, MeshExperts):
        site = getattr(layer.dispatcher, "site", None)
        if site is None:
            raise ConfigError(
                f"{type(layer.dispatcher).__name__} does not say which rank this is.",
                why="a checkpoint names the experts that are here",
                fix="keep the Site that the dispatcher is made with as its attribute `site`",
            )
        ids = ids.chunk(ranks)[site.rank]
    if isinstance(weight, DTensor):
        rows = weight.to_local().shape[0]
        first = weight.__create_chunk_list__()[0].offsets[0] if rows else 0  # type: ignore[no-untyped-call]
        ids = ids[first : first + rows]
    found: list[int] = ids.tolist()
    if len(set(found)) < len(found):
        raise ConfigError(
            f"this rank has replicas of one of its experts: {found}.",
            why="entries of a checkpoint are named by expert",
            fix="place replicas of an expert on different ranks",
        )
    return found


def _copy(own: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    for key, value in own.items():
        if isinstance(value, Mapping):
            _copy(value, given[key])
        elif isinstance(value, Tensor):
            value.copy_(given[key])
