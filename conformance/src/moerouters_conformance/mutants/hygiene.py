"""Mutants of the rules about hygiene."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Literal

import torch
import torch.distributed as dist
from pydantic import ConfigDict, Field
from torch import Tensor

from moerouters import Assignment, Capabilities, Gating, RouteContext, RouterConfig, Routing
from moerouters_conformance.mutants import mutant
from moerouters_conformance.mutants.healthy import Learner, Lossy, Plain, Spoiled


@mutant("H01")
class SeedsTheWorld(Plain):
    """Seeds torch's global generator when it is built."""

    def __init__(self, gating: Gating, config: RouterConfig = RouterConfig()) -> None:
        super().__init__(gating, config)
        torch.manual_seed(0)


@mutant("H01")
class Greets(Plain):
    """Prints a line when it is built."""

    def __init__(self, gating: Gating, config: RouterConfig = RouterConfig()) -> None:
        super().__init__(gating, config)
        print(f"routing over {gating.num_experts} experts")


class OpenConfig(RouterConfig):
    """Takes any field."""

    model_config = ConfigDict(extra="allow")
    rate: float = Field(default=0.1, gt=0, description="Of no use.")


@mutant("H02", config=OpenConfig)
class TakesAnySetting(Plain):
    """Has a config that takes fields it does not know."""


class ThawedConfig(RouterConfig):
    """Can be assigned to."""

    model_config = ConfigDict(frozen=False)
    rate: float = Field(default=0.1, gt=0, description="Of no use.")


@mutant("H03", config=ThawedConfig)
class ChangesItsSettings(Plain):
    """Has a config that can be changed after the router was built."""


class SilentConfig(RouterConfig):
    """Says nothing of its field."""

    rate: float = Field(default=0.1, gt=0)


@mutant("H04", config=SilentConfig)
class Undescribed(Plain):
    """Has a setting that nobody explains."""


class LooseConfig(RouterConfig):
    """Checks types and nothing else."""

    size: int = Field(default=8, description="Length of a table.")


@mutant("H05", config=LooseConfig)
class BreaksOnNegatives(Plain):
    """Makes a table of a size that nobody checked."""

    def __init__(self, gating: Gating, config: LooseConfig) -> None:
        super().__init__(gating, config)
        self.register_buffer("table", torch.zeros(config.size), persistent=False)


class RuleConfig(RouterConfig):
    """One closed choice."""

    rule: Literal["sign", "error"] = Field(default="sign", description="Of no use.")


@mutant("H06", config=RuleConfig, baselines=({"rule": "sgn"},))
class MisspeltBaseline(Plain):
    """Offers a baseline with a value that its config refuses."""


@mutant("H07")
class AssertsItsGating(Plain):
    """Stops in a KeyError at a score function that it did not think of."""

    def __init__(self, gating: Gating, config: RouterConfig = RouterConfig()) -> None:
        super().__init__(gating, config)
        self.bins = {"softmax": 512, "sigmoid": 512, "sqrtsoftplus": 64, "identity": 64}[gating.settings.score]


@mutant("H07")
class RefusesTooLate(Lossy):
    """Finds out in its loss, and not when it is built, that it cannot do relu."""

    def losses(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        if self.gating.settings.score == "relu":
            raise ValueError("relu is not supported")
        return super().losses(routing, ctx)


@mutant("H08")
class NeedsHidden(Lossy):
    """Reads the hidden states without asking whether they were handed in."""

    def losses(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        width = ctx.hidden_TD.shape[1]  # type: ignore[union-attr]
        return {name: loss * (width / width) for name, loss in super().losses(routing, ctx).items()}


@mutant("H09")
class TakesAnyDtype(Plain):
    """Routes logits of any dtype."""

    def _check_dtype(self, logits_TE: Tensor) -> None:
        pass


@mutant("H10", capabilities=Capabilities(causal=False))
class DeclaresSomethingElse(Plain):
    """Is declared as not causal in the spec, and causal on the class."""


@mutant("H11", config=RuleConfig)
class ForgetsItsConfig(Plain):
    """Does not keep the config that it was built with."""

    def __init__(self, gating: Gating, config: RuleConfig) -> None:
        super().__init__(gating)


@mutant("H12")
class PrintsItsLoad(Spoiled):
    """Prints a line per forward."""

    def spoil(self, assignment: Assignment, ctx: RouteContext) -> Assignment:
        print("routed", assignment.num_tokens)
        return assignment


@mutant("H12")
class ReportsInUpdate(Learner):
    """Writes the load to stderr in every update."""

    def update(self, stats: Mapping[str, Tensor]) -> None:
        print("load_E", stats["load_E"].tolist(), file=sys.stderr)
        super().update(stats)


@mutant("H13", reference="arXiv:2101.03961\narXiv:2006.16668")
class TwoLineReference(Plain):
    """Has a reference of two lines."""


@mutant("H14")
class TalksInUpdate(Learner):
    """Sums the load over ranks in update, where `attach` has summed it already."""

    def update(self, stats: Mapping[str, Tensor]) -> None:
        load_E = stats["load_E"].clone()
        if dist.is_initialized():
            dist.all_reduce(load_E)
        super().update({"load_E": load_E})
