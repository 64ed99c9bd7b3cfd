"""Mutants of the rules about what a router keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from moerouters import Capabilities, Gating, LoadScope, RouteContext, RouterConfig, Routing, StateAlgebra
from moerouters_conformance.mutants import mutant
from moerouters_conformance.mutants.healthy import Learner, Plain


class Promiseless(Learner):
    """`Learner` without its balance bound, which is another group's."""

    capabilities = Capabilities(state=StateAlgebra.ADDITIVE, load_scope=LoadScope.GLOBAL)


@mutant("S01")
class CountsStepsOutside(Promiseless):
    """Lets its rate fall with the number of updates, and counts them in a plain attribute."""

    updates: int = 0

    def update(self, stats: Mapping[str, Tensor]) -> None:
        before_E = self.expert_bias_E.clone()
        super().update(stats)
        self.expert_bias_E.sub_(before_E).div_(1 + self.updates).add_(before_E)
        self.updates += 1

    def reset_state(self) -> None:
        super().reset_state()
        self.updates = 0


@mutant("S02")
class UnknownToRegister(Promiseless):
    """Makes its bias by register_buffer, so that state_names does not tell of it."""

    def state_names(self) -> tuple[str, ...]:
        return ()


@mutant("S03")
class ForgetsToReset(Promiseless):
    """Starts its bias anew by a fraction only."""

    def reset_state(self) -> None:
        self.expert_bias_E.mul_(0.5)


@mutant("S04")
class PlainTensor(Promiseless):
    """Keeps a tensor in a plain attribute."""

    def __init__(self, gating: Gating, config: RouterConfig = RouterConfig()) -> None:
        super().__init__(gating, config)
        self.most = torch.tensor(10.0)

    def update(self, stats: Mapping[str, Tensor]) -> None:
        super().update(stats)
        self.expert_bias_E.clamp_max_(self.most)


@mutant("S05")
class FillsWhenBuilt(Promiseless):
    """Fills the buffer of its rates when built, where reset_state does not."""

    def __init__(self, gating: Gating, config: RouterConfig = RouterConfig()) -> None:
        super().__init__(gating, config)
        self.register_buffer("rates_E", torch.ones(gating.num_experts, dtype=torch.float32), persistent=False)

    def update(self, stats: Mapping[str, Tensor]) -> None:
        before_E = self.expert_bias_E.clone()
        super().update(stats)
        self.expert_bias_E.sub_(before_E).mul_(self.get_buffer("rates_E")).add_(before_E)


@mutant("S06")
class FollowsTheModelsDtype(Promiseless):
    """Lets its bias follow the model into bfloat16."""

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        fills, self._state_fills = self._state_fills, {}
        super()._apply(fn, recurse)
        self._state_fills = fills
        return self

    def bias_E(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        return self.expert_bias_E.to(torch.float32)


@mutant("S07")
class TakesTheCheckpointsDtype(Promiseless):
    """Takes its bias in whatever dtype the checkpoint has."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        fills, self._state_fills = self._state_fills, {}
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._state_fills = fills


@mutant("S08")
class HoldsALambda(Promiseless):
    """Holds a function without a name, which no pickle takes."""

    def __init__(self, gating: Gating, config: RouterConfig = RouterConfig()) -> None:
        super().__init__(gating, config)
        self.step = lambda value_E: value_E


@mutant("S09")
class VelocityOutside(Promiseless):
    """Has momentum, whose velocity is not saved."""

    velocity_E: Tensor

    def __init__(self, gating: Gating, config: RouterConfig = RouterConfig()) -> None:
        super().__init__(gating, config)
        self.register_buffer("velocity_E", torch.zeros(gating.num_experts), persistent=False)

    def update(self, stats: Mapping[str, Tensor]) -> None:
        before_E = self.expert_bias_E.clone()
        super().update(stats)
        if not stats["load_E"].any():
            return
        self.velocity_E.mul_(0.5).add_(self.expert_bias_E - before_E)
        self.expert_bias_E.copy_(before_E + self.velocity_E)


@mutant("S10")
class StartsAnewAfterEvaluation(Promiseless):
    """Has momentum, and loses it when it is put into eval mode."""

    velocity_E: Tensor

    def __init__(self, gating: Gating, config: RouterConfig = RouterConfig()) -> None:
        super().__init__(gating, config)
        self.register_state("velocity_E", gating.num_experts)

    def train(self, mode: bool = True) -> Self:
        if not mode:
            self.velocity_E.zero_()
        return super().train(mode)

    def update(self, stats: Mapping[str, Tensor]) -> None:
        before_E = self.expert_bias_E.clone()
        super().update(stats)
        if stats["load_E"].sum() > 0:
            self.velocity_E.copy_(self.expert_bias_E - before_E + self.velocity_E / 2)
            self.expert_bias_E.copy_(before_E + self.velocity_E)


@mutant("S11")
class CountsInFloat32(Promiseless):
    """Counts its load in float32."""

    def observe(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        return {"load_E": routing.load_E.to(torch.float32)}


@mutant("S12")
class SeedsItsStep(Promiseless):
    """Takes its rate from torch's global seed."""

    def update(self, stats: Mapping[str, Tensor]) -> None:
        before_E = self.expert_bias_E.clone()
        super().update(stats)
        self.expert_bias_E.add_(self.expert_bias_E - before_E, alpha=torch.initial_seed() % 7)


@mutant("S13")
class KeepsItsStats(Promiseless):
    """Remembers the last step's load by reference, and skips a step after one without tokens."""

    def update(self, stats: Mapping[str, Tensor]) -> None:
        last_E = getattr(self, "last_E", None)
        if last_E is None or bool(last_E.any()):
            super().update(stats)
        self.last_E = stats["load_E"]


@mutant("S14")
class Overflows(Promiseless):
    """Learns from a sum of exponentials that nothing bounds."""

    def observe(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        assert ctx.valid_T is not None
        real_TE = torch.where(ctx.valid_T.unsqueeze(1), routing.logits_TE, -float("inf"))
        return super().observe(routing, ctx) | {"mass_E": real_TE.float().exp().sum(dim=0)}

    def update(self, stats: Mapping[str, Tensor]) -> None:
        super().update(stats)
        mass_E = stats["mass_E"]
        self.expert_bias_E.sub_(self.rate * mass_E / mass_E.sum().clamp_min(1e-30))


@mutant("S14")
class UnregisteredBuffer(Promiseless):
    """Keeps a second buffer that only torch knows of."""

    def __init__(self, gating: Gating, config: RouterConfig = RouterConfig()) -> None:
        super().__init__(gating, config)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))


@mutant("S15", capabilities=Capabilities())
class UndeclaredState(Promiseless):
    """Learns, and declares state=stateless, so that no update ever comes."""

    capabilities = Capabilities()


@mutant("S16")
class NeverLearns(Promiseless):
    """Computes its step and writes it nowhere."""

    rate: ClassVar[float] = 0.0


@mutant("S15")
class ObservesForNothing(Plain):
    """Observes the load, which nobody takes."""

    def observe(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        return {"load_E": routing.load_E}


@mutant("S17")
class ComparesInFloat32(Promiseless):
    """Counts exactly, and compares with a mean in float32, which sees no single token from 2**24 on."""

    def update(self, stats: Mapping[str, Tensor]) -> None:
        load_E = stats["load_E"].to(torch.float32)
        self.expert_bias_E.add_((load_E.mean() - load_E).sign(), alpha=self.rate)
