"""Expert parallelism of a run: which ranks share one set of experts, and how tokens reach them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from moerouters.dispatch.site import Site
from moerouters.errors import ConfigError
from moerouters.layer import MoELayer
from moerouters.sharding import make_dispatcher, shard_experts


@dataclass(frozen=True, kw_only=True)
class ExpertRanks:
    """Neighbours hold the experts of the model together; each such group has all of them."""

    size: int
    """Ranks of a group."""
    dispatcher: str
    alike: int
    """How many neighbours hold the same tokens."""
    group: dist.ProcessGroup
    """Those of this rank's group."""
    peers: dist.ProcessGroup
    """Those of all groups that own the same experts as this rank."""
    distinct: dist.ProcessGroup | None
    """This rank and others that together hold every token once; None: all."""
    mesh: DeviceMesh | None = None
    """(data, expert, model), where experts are cut."""

    @property
    def label(self) -> str:
        """The dispatcher, and into how many each expert is cut."""
        return self.dispatcher if self.mesh is None else f"{self.dispatcher}, model {self.mesh.size(2)}"

    def may_pad(self, capacity_factor: float | None) -> bool:
        """Whether the back-end may exchange blocks of one size, for which all ranks need equally many tokens."""
        return self.dispatcher == "padded" or (self.dispatcher == "auto" and capacity_factor is not None)

    def spread(self, model: nn.Module) -> None:
        """Leave this rank its part of the experts of every MoELayer; before the optimizer is made."""
        if self.dispatcher == "padded":
            for layer in model.modules():
                if isinstance(layer, MoELayer) and layer.capacity_factor is None:
                    # Room for all tokens at one expert: the back-end wants a limit, the comparison wants nothing lost.
                    layer.capacity_factor = layer.router.gating.num_experts / layer.router.gating.top_k
        shard_experts(model, self.group if self.mesh is None else self.mesh, dispatcher=self.dispatcher)

    def gathered(self, own: Tensor) -> Tensor:
        """[E, ...] of all ranks' [E / size, ...], or of a DTensor, on every rank."""
        if self.mesh is not None:
            whole: Tensor = own.full_tensor()  # type: ignore[attr-defined]
            return whole
        parts = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(parts, own.contiguous(), group=self.group)
        return torch.cat(parts)

    def cut(self, everything: Tensor) -> Tensor:
        """The part of [E, ...] that this rank owns."""
        if self.mesh is not None:
            from moerouters.mesh_experts import cut

            return cut(everything, self.mesh)
        return everything.chunk(self.size)[self.group.rank()].clone()


def local(tensor: Tensor) -> Tensor:
    """What of a DTensor is here; another tensor itself. Without the import of DTensor, which takes half a second."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def expert_ranks(
    size: int,
    dispatcher: str,
    *,
    num_experts: int,
    model_parallel: int = 1,
    stages: int = 1,
    device: str = "cpu",
) -> ExpertRanks:
    """Form groups of `size` neighbours out of all ranks; a collective. model_parallel: neighbours that cut each expert.
    stages: neighbouring groups that hold the experts of other layers, in a pipeline.

    Raises ConfigError where numbers of ranks, or of experts, are not multiples of another, no such dispatcher is, or
    that one cuts no experts.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    _expect_groups(world, size, "--expert-parallel", "the experts are spread over the ranks of a group")
    _expect_groups(size, model_parallel, "--model-parallel", "each expert is cut over neighbours in a group")
    if model_parallel > 1 and dispatcher != "mesh3d":
        raise ConfigError(
            f"dispatcher '{dispatcher}' cuts no experts.",
            where=f"--model-parallel {model_parallel}",
            why="experts are cut along the third dimension of a mesh",
            fix="--dispatcher mesh3d",
        )
    group = partition_group([range(first, first + size) for first in range(0, world, size)])
    peers = partition_group([range(place, world, size * stages) for place in range(size * stages)])
    mesh = _mesh(world, size, model_parallel, peers, device) if dispatcher == "mesh3d" else None
    site = Site(group, backend=dispatcher, mesh=mesh)
    made = make_dispatcher(dispatcher, site)
    (site if mesh is None else replace(site, group=mesh.get_group(1))).experts_here(num_experts)
    alike = size if made.replicated else model_parallel
    distinct = peers if alike == size else partition_group([range(place, world, alike) for place in range(alike)])
    return ExpertRanks(
        size=size,
        dispatcher=dispatcher,
        alike=alike,
        group=group,
        peers=peers,
        distinct=distinct if alike > 1 else None,
        mesh=mesh,
    )


def _expect_groups(ranks: int, size: int, option: str, why: str) -> None:
    if ranks % size:
        raise ConfigError(
            f"{ranks} rank{'s' if ranks > 1 else ''} cannot form groups of {size}.",
            where=f"{option} {size}",
            why=why,
            fix="torchrun --nproc-per-node N -m moerouters compare --expert-parallel N ...",
        )


def _mesh(world: int, size: int, model_parallel: int, peers: dist.ProcessGroup, device: str) -> DeviceMesh:
    firsts = range(0, world, size)
    model = partition_group([range(at, at + model_parallel) for at in range(0, world, model_parallel)])
    expert = partition_group([range(f + p, f + size, model_parallel) for f in firsts for p in range(model_parallel)])
    ranks = torch.arange(world).view(-1, size // model_parallel, model_parallel)
    return DeviceMesh.from_group([peers, expert, model], device, ranks, mesh_dim_names=("data", "expert", "model"))


def partition_group(partition: Sequence[Sequence[int]]) -> dist.ProcessGroup:
    """The group of the part that holds this rank; a collective. All ranks make all groups: torch wants it so."""
    made, _ = dist.new_subgroups_by_enumeration([list(part) for part in partition])  # type: ignore[no-untyped-call]
    assert isinstance(made, dist.ProcessGroup)
    return made
