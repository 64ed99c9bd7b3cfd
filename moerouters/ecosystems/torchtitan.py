"""torchtitan: a router plug-in in the place of TokenChoiceTopKRouter.

    --override.imports 'moerouters.ecosystems.torchtitan.router={"name": "loss-free"}'

puts it into every MoE layer of the model config, and `attach` goes where torchtitan registers its own balancer:

    spec = dataclasses.replace(spec, post_optimizer_build_fn=torchtitan.attach)

Gate, experts, dispatch and checkpoints stay torchtitan's. Tested with torchtitan 0.3.0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

import moerouters
from moerouters.ecosystems.common import (
    as_one,
    expect_neutral,
    expect_slots,
    filled_slots,
    may_leave_slots_empty,
    needs,
    try_out,
)
from moerouters.errors import ConfigError, UnsupportedError
from moerouters.gating import Gating
from moerouters.handle import Handle
from moerouters.losses import LossMode
from moerouters.routed import RoutedModule
from moerouters.state import StatefulModule
from moerouters.types import RouteContext

with needs("torchtitan"):
    from torchtitan.config import override
    from torchtitan.models.common.moe import MoE, TokenChoiceTopKRouter


class PluginRouter(RoutedModule, TokenChoiceTopKRouter):  # type: ignore[misc]  # torchtitan may not be installed
    """torchtitan's gate, and a router plug-in behind it. Losses are injected into the backward pass."""

    loss_modes: ClassVar[frozenset[LossMode]] = frozenset({"inject"})
    gate: nn.Linear

    @dataclass(kw_only=True, slots=True)
    class Config(TokenChoiceTopKRouter.Config):  # type: ignore[misc]
        """That of the stock router, and which plug-in."""

        plugin: str
        plugin_config: dict[str, Any] = field(default_factory=dict)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        expect_neutral(
            {"_debug_force_load_balance": config._debug_force_load_balance},
            {"_debug_force_load_balance": False},
            where="TokenChoiceTopKRouter.Config",
        )
        router = moerouters.build(config.plugin, gating_of(config), config=config.plugin_config)
        if router.capabilities.parameters:
            raise UnsupportedError(
                f"router '{config.plugin}' has parameters of its own.",
                why="torchtitan builds models without storage and would not initialise them",
                fix="configure the router without them, or choose another",
            )
        self._set_router(router, hidden_size=config.gate.in_features, loss_mode="inject")
        tried = try_out(router, hidden_size=config.gate.in_features, device=self.gate.weight.device)
        expect_slots(tried, router, where="torchtitan's token dispatchers")

    def forward(self, x_BLD: Tensor, expert_bias_E: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """([B, L, K] weights, [B, L, K] ids, [B, L, E] scores), as the stock router."""
        if expert_bias_E is not None:
            raise ConfigError(
                "the MoE layer has a balancer of its own.",
                where="MoE.Config: load_balance_coeff",
                why="its bias and that of the router plug-in would work against each other",
                fix="load_balance_coeff=None, which the override `moerouters.ecosystems.torchtitan.router` sets",
            )
        # The line of the stock router, for the same bits.
        with torch.autocast(device_type=x_BLD.device.type, dtype=torch.float32):
            logits_BLE = self.gate(x_BLD)
        B, L, E = logits_BLE.shape
        logits_TE = logits_BLE.reshape(B * L, E)
        ctx = RouteContext(
            sequence_ids_T=torch.arange(B, device=x_BLD.device).unsqueeze(1).expand(B, L).reshape(-1),
            num_sequences=B,
            hidden_TD=x_BLD.reshape(B * L, -1),
        )
        assignment = self._account(self._assign(logits_TE, ctx))
        if may_leave_slots_empty(self.router):
            assignment = filled_slots(assignment)
        ids_TK = assignment.expert_ids_TK.clamp(max=E - 1)  # of a row of infinities, which the step reports
        scores_TE = self.router.gating.score(self.router.gating.prepare(logits_TE))
        return assignment.weights_TK.reshape(B, L, -1), ids_TK.reshape(B, L, -1), scores_TE.reshape(B, L, E)

    def _init_self_buffers(self, *, buffer_device: torch.device | None = None) -> None:
        """Called by torchtitan once the model has storage."""
        for module in self.router.modules():
            if isinstance(module, StatefulModule):
                module.reset_state()

    def _router_parameters(self) -> Iterator[nn.Parameter]:
        yield from self.parameters()


@override(  # type: ignore[untyped-decorator]
    target=MoE.Config, description="A router plug-in of moerouters in every MoE layer."
)
def router(cfg: Any, *, name: str, config: Mapping[str, Any] | None = None) -> Any:
    """For `override.imports`: the same MoE config with the router plug-in `name`, and without torchtitan's balancer."""
    stock = cfg.router
    settings = {each.name: getattr(stock, each.name) for each in fields(stock)}
    plugged = PluginRouter.Config(**settings, plugin=name, plugin_config=dict(config or {}))
    return replace(cfg, router=plugged, load_balance_coeff=None)


def gating_of(config: Any) -> Gating:
    """The gating that a TokenChoiceTopKRouter.Config describes."""
    settings: dict[str, Any] = {"renormalize": config.route_norm, "scale": config.route_scale, "ties": "torch"}
    if config.num_expert_groups is not None:
        groups = {"num_groups": config.num_expert_groups, "kept_groups": config.num_limited_groups}
        settings |= groups | {"group_score": "top2_sum"}
    return Gating.of(config.num_experts, config.top_k, score=config.score_func, **settings)


def attach(
    optimizers: Optimizer, model_parts: Sequence[nn.Module], parallel_dims: Any, *, accumulation_steps: int = 1
) -> Handle | None:
    """For `ModelSpec.post_optimizer_build_fn`: routers learn after each step. None if no part holds one.

    torchtitan divides its loss by the tokens of the whole step and adds gradients up, so injected losses are divided by
    the passes of a step: ranks times accumulation_steps, which is gradient accumulation times pipeline micro-batches.
    """
    whole = as_one(model_parts)
    if not any(isinstance(module, PluginRouter) for module in whole.modules()):
        return None
    if parallel_dims.tp > 1:
        raise UnsupportedError(
            "a router plug-in does not train under torchtitan's tensor parallelism.",
            where=f"tensor_parallel_degree={parallel_dims.tp}",
            why="its ranks add up gradients of the gate, so a loss of the router would count once for each of them",
            fix="tensor_parallel_degree=1; data, context, expert and pipeline parallelism may stay",
        )
    group: dist.ProcessGroup = parallel_dims.get_optional_mesh("loss", include_singleton_axes=True).get_group()
    handle = moerouters.attach(optimizers, whole, token_group=group)
    handle.scale_losses(accumulation_steps=dist.get_world_size(group) * accumulation_steps)
    return handle
