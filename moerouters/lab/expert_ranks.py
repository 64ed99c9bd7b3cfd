"""Expert parallelism of a run: which ranks share one set of experts, and how tokens reach them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

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
    replicated: bool
    """Whether the ranks of a group hold the same tokens."""
    group: dist.ProcessGroup
    """Those of this rank's group."""
    peers: dist.ProcessGroup
    """Those of all groups that own the same experts as this rank."""

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
        shard_experts(model, self.group, dispatcher=self.dispatcher)

    def gathered(self, own: Tensor) -> Tensor:
        """[E, ...] of all ranks' [E / size, ...], on every rank."""
        parts = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(parts, own.contiguous(), group=self.group)
        return torch.cat(parts)

    def cut(self, everything: Tensor) -> Tensor:
        """The part of [E, ...] that this rank owns."""
        return everything.chunk(self.size)[self.group.rank()].clone()


def expert_ranks(size: int, dispatcher: str, *, num_experts: int) -> ExpertRanks:
    """Form groups of `size` neighbours out of all ranks; a collective.

    Raises ConfigError where the number of ranks, or of experts, is not a multiple of it, or no such dispatcher is.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world % size:
        raise ConfigError(
            f"{world} rank{'s' if world > 1 else ''} cannot form groups of {size}.",
            where=f"--expert-parallel {size}",
            why="the experts are spread over the ranks of a group",
            fix=f"torchrun --nproc-per-node {size} -m moerouters compare --expert-parallel {size} ...",
        )
    group = _mine([range(first, first + size) for first in range(0, world, size)])
    peers = _mine([range(place, world, size) for place in range(size)])
    site = Site(group, backend=dispatcher)
    site.experts_here(num_experts)
    replicated = make_dispatcher(dispatcher, site).replicated
    return ExpertRanks(size=size, dispatcher=dispatcher, replicated=replicated, group=group, peers=peers)


def _mine(partition: list[range]) -> dist.ProcessGroup:
    """The group of the part that holds this rank. All ranks make all groups: torch wants it so."""
    made, _ = dist.new_subgroups_by_enumeration([list(part) for part in partition])  # type: ignore[no-untyped-call]
    assert isinstance(made, dist.ProcessGroup)
    return made
