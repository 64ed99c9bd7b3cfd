"""The settings of the router `device-limited`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from moerouters import RouterConfig


class DeviceLimitedConfig(RouterConfig):
    """Devices, the limit, and the coefficients of the losses; a coefficient of 0 leaves its loss out.

    The coefficients are DeepSeek-V2's (arXiv:2405.04434, section 3.1.2), which had D = 8 devices and M = 3.
    """

    num_devices: int | None = Field(
        default=None,
        ge=1,
        description="D: experts stand in as many equal, contiguous blocks. None: the expert groups of the gating, "
        "which then limits tokens by itself; one device where it has none.",
    )
    max_devices: int | None = Field(
        default=None, ge=1, description="M: devices that a token's experts lie on at most; needs num_devices. None: D."
    )
    group_score: Literal["max", "top_sum"] = Field(
        default="max",
        description="What makes a device one of the M: its best expert (DeepSeek-V2), or the sum of its best K / M, "
        "rounded up (DeepSeek-V3).",
    )
    expert_alpha: float = Field(
        default=0.003, ge=0, description="Coefficient of `expert`, the balance loss over experts (alpha_1)."
    )
    device_alpha: float = Field(
        default=0.05, ge=0, description="Coefficient of `device`, the balance loss over devices' load (alpha_2)."
    )
    communication_alpha: float = Field(
        default=0.02,
        ge=0,
        description="Coefficient of `communication`, the balance loss over tokens that devices receive (alpha_3).",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_devices is not None:
            if self.num_devices is None:
                raise ValueError("max_devices needs num_devices: the gating's groups come with a limit of their own")
            if self.max_devices > self.num_devices:
                raise ValueError(f"max_devices {self.max_devices} exceeds num_devices {self.num_devices}")
        elif self.group_score != "max":
            raise ValueError("group_score needs max_devices: without a limit no device has to be scored")
        return self

    @property
    def balances(self) -> bool:
        """Whether any loss looks at the load."""
        return bool(self.expert_alpha or self.device_alpha or self.communication_alpha)
