"""The routers behind the name `device-limited`: the losses, and with a limit of their own the limit."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from moerouters import Capabilities, Gating, LoadScope, RouteContext, Router, Routing
from moerouters_device_limited.config import DeviceLimitedConfig
from moerouters_device_limited.devices import Devices, devices_of_tokens, limit_devices
from moerouters_device_limited.losses import communication_loss, device_loss, expert_loss, mean_probability


def make_router(gating: Gating, config: DeviceLimitedConfig = DeviceLimitedConfig()) -> DeviceBalancedRouter:
    """The router of these settings. Raises ConfigError where the devices do not fit the gating.

    Two classes, since a router that overrides no stage of the choice keeps the fused path, and in a swapped model with
    groups of its own the stock router's bits.
    """
    devices = Devices.of(gating, config)
    return (DeviceLimitedRouter if devices.limited_here else DeviceBalancedRouter)(gating, config)


def capabilities_of(config: DeviceLimitedConfig) -> Capabilities:
    """What a router with this config promises. `device` and `communication` grow with D, not with E, so their values
    at balance have no place in `balanced_losses`."""
    return Capabilities(
        load_scope=LoadScope.LOCAL if config.balances else LoadScope.NONE,
        balanced_losses={"expert": config.expert_alpha} if config.expert_alpha else {},
    )


class DeviceBalancedRouter(Router):
    """Top-k as the gating does it, and up to three losses: `expert`, `device` and `communication`."""

    reads: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, gating: Gating, config: DeviceLimitedConfig = DeviceLimitedConfig()) -> None:
        super().__init__(gating)
        self.config = config
        self.capabilities = capabilities_of(config)
        self.devices = Devices.of(gating, config)

    def losses(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        config, valid_T, number = self.config, ctx.valid_T, self.devices.number
        assert valid_T is not None  # the template fills it in
        if not config.balances:
            return {}
        # Rows that do not count become zeros: whatever they hold, NaN included, no gradient passes through it.
        logits_TE = torch.where(valid_T.unsqueeze(1), routing.logits_TE, 0.0)
        probability_E = mean_probability(self.gating.probabilities(logits_TE), valid_T)
        found: dict[str, Tensor] = {}
        if config.expert_alpha:
            found["expert"] = config.expert_alpha * expert_loss(routing.load_E, probability_E)
        if number == 1:  # the losses of devices are constants then, and their gradient is rounding
            return found
        if config.device_alpha:
            found["device"] = config.device_alpha * device_loss(routing.load_E, probability_E, number)
        if config.communication_alpha:
            sent_TD = devices_of_tokens(routing.expert_ids_TK, num_experts=self.gating.num_experts, num_devices=number)
            found["communication"] = config.communication_alpha * communication_loss(
                sent_TD, probability_E, tokens=valid_T.sum(), most=self.devices.most
            )
        return found


class DeviceLimitedRouter(DeviceBalancedRouter):
    """The same, with each token's experts among those of its M best devices."""

    def adjust(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        return limit_devices(scores_TE, self.devices, self.gating, self.config.group_score)
