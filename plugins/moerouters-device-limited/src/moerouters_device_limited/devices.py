"""Which experts stand on which device, and whether the router or the gating keeps tokens to M of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moerouters import Gating
from moerouters.errors import ConfigError
from moerouters.kernels.gating import open_groups
from moerouters_device_limited.config import DeviceLimitedConfig


class Devices(NamedTuple):
    """D equal, contiguous blocks of experts, as `moerouters.shard_experts` gives them to ranks."""

    number: int
    """D."""
    most: int
    """M, for a token."""
    limited_here: bool
    """Whether the router keeps tokens to M devices; else the gating does, or nothing has to."""

    @classmethod
    def of(cls, gating: Gating, config: DeviceLimitedConfig) -> Devices:
        """Raises ConfigError where the devices do not fit the gating."""
        settings = gating.settings
        if config.num_devices is None:
            return cls(settings.num_groups, settings.kept_groups, limited_here=False)
        E, K, D = settings.num_experts, settings.top_k, config.num_devices
        M = D if config.max_devices is None else config.max_devices
        if E % D:
            raise _unfit(f"num_experts {E} is not a multiple of num_devices {D}", "every device holds as many experts")
        if M * (E // D) < K:
            raise _unfit(f"{M} devices of {E // D} experts hold fewer than top_k {K}", "raise max_devices")
        limited_here = M < D
        if limited_here and settings.kept_groups < settings.num_groups:
            raise _unfit(
                f"the gating already keeps tokens to {settings.kept_groups} of {settings.num_groups} groups; under a "
                "second limit a token may be left with fewer than top_k experts",
                "leave num_devices out: the gating's groups are the devices then; or leave max_devices out",
            )
        return cls(D, M, limited_here)


def limit_devices(adjusted_TE: Tensor, devices: Devices, gating: Gating, group_score: str) -> Tensor:
    """[T, E] adjusted scores, -inf on all but each token's M best devices; among equal ones the lower comes first."""
    score_TD = score_devices(adjusted_TE, devices, top_k=gating.top_k, group_score=group_score)
    return open_groups(score_TD, gating.top(score_TD, devices.most), adjusted_TE)


def score_devices(adjusted_TE: Tensor, devices: Devices, *, top_k: int, group_score: str) -> Tensor:
    """[T, D]: each device's best expert, or the sum of its best ceil(K / M).

    That many are there: M devices hold at least K experts.
    """
    T, E = adjusted_TE.shape
    score_TDe = adjusted_TE.reshape(T, devices.number, E // devices.number)
    if group_score == "max":
        return score_TDe.amax(dim=-1)
    return score_TDe.topk(-(-top_k // devices.most), dim=-1).values.sum(dim=-1)


def devices_of_tokens(expert_ids_TK: Tensor, *, num_experts: int, num_devices: int) -> Tensor:
    """bool [T, D]: the devices that each token is sent to, however many experts it has there; E is an empty slot."""
    device_ids_TK = expert_ids_TK // (num_experts // num_devices)  # of an empty slot: D, a column that is cut off
    sent = torch.zeros(expert_ids_TK.shape[0], num_devices + 1, dtype=torch.bool, device=expert_ids_TK.device)
    return sent.scatter(1, device_ids_TK, True)[:, :num_devices]


def _unfit(why: str, fix: str) -> ConfigError:
    return ConfigError("router 'device-limited' cannot place the experts of this gating.", why=why, fix=fix)
