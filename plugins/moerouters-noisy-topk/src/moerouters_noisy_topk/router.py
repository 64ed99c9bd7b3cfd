"""NoisyTopkRouter: top-k of logits with noise in training, and losses that see who was close to being chosen."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moerouters import Capabilities, Gating, LoadScope, RouteContext, Router, Routing
from moerouters.errors import ConfigError, ShapeError
from moerouters.noise import normal_noise
from moerouters_noisy_topk.config import NoisyTopkConfig
from moerouters_noisy_topk.losses import expected_load, importance, squared_variation

LEAST_STD = 0.01
"""Added to a learned standard deviation, as in the authors' code (tensor2tensor): the load loss divides by it."""


def capabilities_of(config: NoisyTopkConfig, *, learns_noise: bool) -> Capabilities:
    """What a router with this config promises."""
    balances = bool(config.importance or config.load)
    return Capabilities(parameters=learns_noise, load_scope=LoadScope.LOCAL if balances else LoadScope.NONE)


class NoisyTopkRouter(Router):
    """In training experts are chosen by logits with normal noise, in eval by the logits as they are.

    Noise moves the choice alone. Weights come from the logits without it, where the paper's come from the noisy ones.

    Parameter, with `hidden_size`: `noise_ED`, W_noise, zeros at first, so that the standard deviation starts at ln 2
    everywhere. It learns from the load loss. With K = E there is nothing to choose: no noise, no parameter, no load
    loss.

    Raises ContextError in training without noise_key, and with `hidden_size` without hidden_TD; ShapeError for hidden
    states of another width; ConfigError where the load loss could not be right, or the noise not be learned.
    """

    reads: ClassVar[frozenset[str]] = frozenset()
    noise_ED: nn.Parameter

    def __init__(self, gating: Gating, config: NoisyTopkConfig = NoisyTopkConfig()) -> None:
        super().__init__(gating)
        self.config = config
        _refuse(gating, config)
        self._chooses = gating.top_k < gating.num_experts
        learns_noise = config.hidden_size is not None and self._chooses
        self.capabilities = capabilities_of(config, learns_noise=learns_noise)
        if config.hidden_size is not None and learns_noise:
            self.noise_ED = nn.Parameter(torch.zeros(gating.num_experts, config.hidden_size))

    def adjust(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        if not (self.training and self._chooses):
            return scores_TE
        assert ctx.logits_TE is not None  # the template fills it in
        noisy_TE, _ = self._noisy(ctx.logits_TE, ctx)
        return self.gating.corrected(self.gating.score(noisy_TE))

    def losses(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        config, valid_T = self.config, ctx.valid_T
        assert valid_T is not None
        found: dict[str, Tensor] = {}
        if config.importance:
            sums_E = importance(routing.weights, routing.expert_ids_TK, valid_T, self.gating.num_experts)
            found["importance"] = config.importance * squared_variation(sums_E)
        if config.load and self._chooses:
            noisy_TE, std_TE = self._noisy(routing.logits_TE, ctx)
            load_E = expected_load(routing.logits_TE, noisy_TE, std_TE, valid_T, self.gating)
            found["load"] = config.load * squared_variation(load_E)
        return found

    def _noisy(self, logits_TE: Tensor, ctx: RouteContext) -> tuple[Tensor, Tensor]:
        """Logits with the noise of this pass, and its standard deviation, [T, E] or 0-d."""
        noise_TE = normal_noise(ctx.need("noise_key", router="noisy-topk"), tuple(logits_TE.shape))
        std_TE = self._std(logits_TE, ctx)
        return logits_TE + noise_TE.to(logits_TE.dtype) * std_TE, std_TE

    def _std(self, logits_TE: Tensor, ctx: RouteContext) -> Tensor:
        if not self.capabilities.parameters:
            return torch.full((), self.config.std, dtype=logits_TE.dtype, device=logits_TE.device)
        hidden_TD = ctx.need("hidden_TD", router="noisy-topk")
        assert ctx.valid_T is not None
        if hidden_TD.shape[1] != self.config.hidden_size:
            raise ShapeError(
                f"router 'noisy-topk' got hidden states of width {hidden_TD.shape[1]}, and was built for "
                f"{self.config.hidden_size}.",
                why="it learns the size of its noise from them",
                fix=f"build it with config={{'hidden_size': {hidden_TD.shape[1]}}}",
            )
        hidden_TD = torch.where(ctx.valid_T.unsqueeze(1), hidden_TD, 0.0)  # padding may hold NaN
        raw_TE = F.linear(hidden_TD.to(logits_TE.dtype), self.noise_ED.to(logits_TE.dtype))
        return F.softplus(raw_TE) + LEAST_STD


def _refuse(gating: Gating, config: NoisyTopkConfig) -> None:
    """Raise ConfigError for what would train on a wrong load, or not at all."""
    settings = gating.settings
    if config.hidden_size is not None and not config.load:
        raise ConfigError(
            "router 'noisy-topk' cannot learn its noise without the load loss.",
            where=f"hidden_size={config.hidden_size}, load=0",
            why="noise moves the choice and not the weights, so no other loss has a gradient for it",
            fix="set load above 0, the paper's 0.1, or leave hidden_size out",
        )
    steered = [
        name
        for name, is_so in {
            "correction_bias=True": settings.correction_bias,
            f"kept_groups={settings.kept_groups}": settings.kept_groups < settings.num_groups,
        }.items()
        if is_so
    ]
    if config.load and steered:
        raise ConfigError(
            "router 'noisy-topk' has no load loss under this gating.",
            where=f"gating with {' and '.join(steered)}",
            why="the chance of an expert to be chosen is worked out for a choice by logits alone",
            fix="set load=0",
        )
