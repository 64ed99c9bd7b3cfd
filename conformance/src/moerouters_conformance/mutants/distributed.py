"""Mutants of the rules about several ranks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from moerouters import Assignment, Gating, RouteContext, RouterConfig, Routing
from moerouters_conformance.mutants import mutant
from moerouters_conformance.mutants.healthy import Learner, Lossy, Plain, Solver, Spoiled, swap


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


@mutant("D01")
class AveragesOverRanks(Learner):
    """Divides the load, which is already a sum over ranks, by the number of ranks, and rounds."""

    def update(self, stats: Mapping[str, Tensor]) -> None:
        super().update({"load_E": stats["load_E"] // _world()})


@mutant("D02")
class OwnNoise(Learner):
    """Adds noise of its own on every rank to break ties."""

    def update(self, stats: Mapping[str, Tensor]) -> None:
        super().update(stats)
        self.expert_bias_E.add_(_rank() * 1e-3)


@mutant("D03")
class SkipsWithoutTokens(Lossy):
    """Sums the load over ranks in forward, unless it has no tokens."""

    capabilities = Lossy.capabilities.model_copy(update={"forward_collective": True})

    def losses(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        if _world() > 1 and torch.is_grad_enabled() and routing.scores_TE.shape[0]:
            dist.all_reduce(routing.load_E.clone())
        return super().losses(routing, ctx)


@mutant("D04")
class CountsOnTheWorld(Solver):
    """Expects one forward from every rank of the world, and makes up for those that are missing."""

    def observe(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        found = super().observe(routing, ctx)
        return found | {"forwards": torch.ones_like(found["tokens"])}

    def update(self, stats: Mapping[str, Tensor]) -> None:
        missing = _world() / stats["forwards"].clamp_min(1) if _world() > 1 else 1
        sums_E = stats["offset_times_tokens_E"] * missing
        super().update({"tokens": stats["tokens"], "offset_times_tokens_E": sums_E})


class RateConfig(RouterConfig):
    """One setting."""

    rate: float = 0.01


@mutant("D05", config=RateConfig)
class ForgetsItsConfig(Learner):
    """Reads its config and does not keep it, so that nothing tells two settings apart."""

    def __init__(self, gating: Gating, config: RateConfig = RateConfig()) -> None:  # noqa: B008
        super().__init__(gating)
        self.rate = config.rate  # type: ignore[misc]


@mutant("D06")
class RankDependent(Spoiled):
    """Scales its weights by a number that depends on the rank."""

    def spoil(self, assignment: Assignment, ctx: RouteContext) -> Assignment:
        return swap(assignment, weights=assignment.weights * (1 + 1e-6 * _rank()))


@mutant("D07")
class TalksUndeclared(Plain):
    """Sums its load over the ranks in forward and declares that it does not."""

    def losses(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        if _world() > 1 and torch.is_grad_enabled():
            dist.all_reduce(routing.load_E.clone())
        return {}
