"""The stages of a model that lie on this rank, and weights that several stages share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moerouters.errors import ConfigError
from moerouters.pipeline.schedule import Schedule
from moerouters.pipeline.site import Site
from moerouters.pipeline.transport import Transport

Stages = Sequence[nn.Module] | Callable[[int], nn.Module]
"""All stages of a model, or what builds stage s."""
Shared = Mapping[str, Sequence[tuple[int, str]]]
"""By any name: (stage, name of the parameter in it) of every copy of a weight."""


def cut(layers: nn.Sequential, num_stages: int) -> list[nn.Sequential]:
    """Runs of layers, as equal in number as can be, the longer ones first. Raises ConfigError for fewer layers."""
    parts = list(layers)
    return [nn.Sequential(*(parts[at] for at in run)) for run in runs(len(layers), num_stages)]


def runs(num_layers: int, num_stages: int) -> list[range]:
    """The numbers of the layers of every stage, as `cut` cuts them."""
    if not 1 <= num_stages <= num_layers:
        raise ConfigError(
            f"{num_layers} layers cannot be cut into {num_stages} stages.", why="a stage has a layer", fix="take fewer"
        )
    short, longer = divmod(num_layers, num_stages)
    starts = [stage * short + min(stage, longer) for stage in range(num_stages + 1)]
    return [range(a, b) for a, b in itertools.pairwise(starts)]


def stages_here(stages: Stages, schedule: Schedule, rank: int) -> nn.ModuleDict:
    """The stages that lie on a rank, by their number; no others are built or held."""
    if not callable(stages) and len(stages) != schedule.num_stages:
        raise ConfigError(
            f"there are {len(stages)} stages.",
            where=f"schedule '{schedule.name}'",
            why=f"the schedule has {schedule.num_stages} stages",
            fix="cut the model into as many",
        )
    build = stages if callable(stages) else stages.__getitem__
    return nn.ModuleDict({str(stage): build(stage) for stage in schedule.stages_of(rank)})


@dataclass
class _Weight:
    name: str
    copies: list[nn.Parameter]
    """Of this rank; more than one where several of its stages have one."""
    holders: tuple[int, ...]
    """The ranks with a copy, this one among them."""
    before: Tensor | None = None


class SharedWeights:
    """Weights with copies in several stages.

    Each copy gathers the gradient of its own stage over the microbatches. After the last of them, one sum over the
    copies makes them alike, so that no microbatch sends a gradient for them (JaxPP, arXiv:2412.14374). Optimizers that
    do the same to each then keep the copies alike. Ranks send their sums to each other: copies are few, and a group for
    each set of ranks would have to be made by all ranks of the job.
    """

    def __init__(
        self, shared: Shared, here: nn.ModuleDict, schedule: Schedule, site: Site, transport: Transport
    ) -> None:
        """Collective over the ranks with copies, which get the value of the first one."""
        self._site, self._transport, self._rank = site, transport, site.group.rank()
        self._weights: list[_Weight] = []
        for name, places in sorted(shared.items()):
            holders = tuple(sorted({schedule.placement[stage] for stage, _ in places}))
            if self._rank in holders:
                copies = {id(p): p for stage, path in places if (p := _find(here, stage, path, name)) is not None}
                self._weights.append(_Weight(name, list(copies.values()), holders))
        for weight in self._weights:
            value = self._exchange(weight, weight.copies[0].detach())[0]
            for copy in weight.copies:
                copy.data.copy_(value)

    def begin(self) -> None:
        """Put gradients of earlier steps aside: they have been summed already."""
        for weight in self._weights:
            weight.before = weight.copies[0].grad
            for copy in weight.copies:
                copy.grad = None

    def end(self) -> None:
        """One sum over all copies of each weight, in the same order on every rank."""
        for weight in self._weights:
            grads = [copy.grad for copy in weight.copies if copy.grad is not None]
            own = torch.stack(grads).sum(dim=0) if grads else torch.zeros_like(weight.copies[0])
            total = torch.stack(self._exchange(weight, own)).sum(dim=0)
            if weight.before is not None:
                total += weight.before
            weight.before = None
            for index, copy in enumerate(weight.copies):
                copy.grad = total if index == 0 else total.clone()

    def _exchange(self, weight: _Weight, own: Tensor) -> list[Tensor]:
        """What every holder has, in order."""
        peers = [holder for holder in weight.holders if holder != self._rank]
        found = {peer: torch.empty_like(own, memory_format=torch.contiguous_format) for peer in peers}
        own = own.contiguous()
        try:
            for work in self._transport.start([(own, peer) for peer in peers], [(found[peer], peer) for peer in peers]):
                work.wait()
        except RuntimeError as error:
            raise self._site.failed(f"the sum over copies of the shared weight '{weight.name}'", error) from error
        found[self._rank] = own
        return [found[holder] for holder in weight.holders]


def _find(here: nn.ModuleDict, stage: int, path: str, name: str) -> nn.Parameter | None:
    """The parameter, if its stage lies on this rank."""
    if str(stage) not in here:
        return None
    parameters = dict(here[str(stage)].named_parameters(remove_duplicate=False))
    if path not in parameters:
        raise ConfigError(
            f"stage {stage} has no parameter '{path}'.",
            where=f"shared weight '{name}'",
            why=f"it has: {', '.join(parameters) or 'none'}",
            fix="give the name that named_parameters() of the stage shows",
        )
    return parameters[path]
