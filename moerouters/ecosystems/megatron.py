"""Megatron-core: a router plug-in as the `router` of `MoESubmodules`.

    submodules = MoESubmodules(experts=..., router=megatron.builder("loss-free"))
    ...
    handle = megatron.attach(optimizer, model)      # optimizer and model chunks as Megatron's training loop has them

Experts, dispatchers and parallelism stay Megatron's. The gate is Megatron's too: same parameter, name, initialisation
and arithmetic. Tested with megatron-core 0.16.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

import moerouters
from moerouters.assignment import Assignment
from moerouters.ecosystems.common import (
    as_one,
    chosen_map,
    expect_neutral,
    expect_slots,
    filled_slots,
    may_leave_slots_empty,
    needs,
    try_out,
)
from moerouters.errors import UnsupportedError
from moerouters.gating import Gating
from moerouters.handle import Handle
from moerouters.losses import LossMode
from moerouters.registry import RouterConfig
from moerouters.routed import RoutedModule
from moerouters.router import Router
from moerouters.types import RouteContext

with needs("megatron-core"):
    from megatron.core.transformer.moe.moe_utils import (
        MoEAuxLossAutoScaler,
        apply_router_token_dropping,
        router_gating_linear,
    )

_NEUTRAL = {
    "moe_router_load_balancing_type": "none",
    "moe_router_enable_expert_bias": False,
    "moe_aux_loss_coeff": 0.0,
    "moe_z_loss_coeff": None,
    "moe_input_jitter_eps": None,
    "moe_router_force_load_balancing": False,
    "moe_enable_routing_replay": False,
}
"""Settings of TransformerConfig that Megatron's own router follows and ours does not."""
_DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


class MegatronRouter(RoutedModule):
    """Gate and router in the place of Megatron's TopKRouter; made by what `builder` returns.

    Losses of the router ride on the weights by Megatron's own MoEAuxLossAutoScaler, whose scale the schedules set.
    """

    loss_modes: ClassVar[frozenset[LossMode]] = frozenset({"collect"})
    """Collected right here: attach counts that each was differentiated."""

    def __init__(self, router: Router, config: Any, pg_collection: Any) -> None:
        super().__init__()
        self.config = config
        self.layer_number: int | None = None
        self.distinct_tokens: dist.ProcessGroup = pg_collection.tp_dp_cp
        self._parts_of_a_batch: int = pg_collection.tp_cp.size()
        self._takes_any_number = config.moe_token_dispatcher_type == "allgather"
        # As the stock router does it: made in float32 and cast, so that a seed gives the same weights.
        self.weight = nn.Parameter(torch.empty(config.num_moe_experts, config.hidden_size, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(config.num_moe_experts)) if config.add_bias_linear else None
        for parameter in self.parameters():
            if config.perform_initialization:
                config.init_method(parameter)
            parameter.data = parameter.data.to(config.params_dtype)
        self._set_router(router, hidden_size=config.hidden_size, loss_mode="collect")
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # Megatron sums these
        tried = try_out(router, hidden_size=config.hidden_size, device=self.weight.device)
        if not self._takes_any_number:
            where = f"moe_token_dispatcher_type={config.moe_token_dispatcher_type!r}; 'allgather' takes any number"
            expect_slots(tried, router, where=where)

    def set_layer_number(self, layer_number: int) -> None:
        """Called by Megatron's transformer layer."""
        self.layer_number = layer_number

    def forward(self, hidden_SBD: Tensor, padding_mask_SB: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """([T, E] weights, bool [T, E] map) of [S, B, D] states, T = S * B. padding_mask: True is padding."""
        S, B, D = hidden_SBD.shape
        dtype = _DTYPES.get(self.config.moe_router_dtype, hidden_SBD.dtype)
        logits_TE = router_gating_linear(hidden_SBD, self.weight, self.bias, dtype).reshape(S * B, -1)
        ctx = RouteContext(
            valid_T=None if padding_mask_SB is None else ~padding_mask_SB.reshape(-1),
            sequence_ids_T=torch.arange(B, device=logits_TE.device).expand(S, B).reshape(-1),
            num_sequences=B,
            hidden_TD=hidden_SBD.reshape(-1, D),
        )
        assignment = self._account(self._assign(logits_TE, ctx))
        weights_TE, map_TE = self._maps(assignment, logits_TE, padded=padding_mask_SB is not None)
        if self.config.moe_expert_capacity_factor is not None:
            weights_TE, map_TE = apply_router_token_dropping(
                weights_TE,
                map_TE,
                router_topk=self.config.moe_router_topk,
                capacity_factor=self.config.moe_expert_capacity_factor,
                drop_policy=self.config.moe_token_drop_policy,
                pad_to_capacity=self.config.moe_pad_expert_input_to_capacity,
            )
        return self._with_losses(weights_TE, assignment), map_TE

    def _maps(self, assignment: Assignment, logits_TE: Tensor, *, padded: bool) -> tuple[Tensor, Tensor]:
        if not self._takes_any_number and (padded or may_leave_slots_empty(self.router)):
            assignment = filled_slots(assignment)
        token_ids_N, expert_ids_N, weights_N = assignment.pairs()
        wide_TE = logits_TE.new_zeros(logits_TE.shape[0], logits_TE.shape[1] + 1)  # the last column takes empty places
        wide_TE = wide_TE.index_put((token_ids_N, expert_ids_N), weights_N.to(logits_TE.dtype))
        return wide_TE[:, :-1].contiguous(), chosen_map(assignment)

    def _with_losses(self, weights_TE: Tensor, assignment: Assignment) -> Tensor:
        if not self.training or not assignment.losses:
            return weights_TE
        # Megatron adds up the gradients of the ranks that share a batch, so each gives its part.
        total = torch.stack(list(assignment.losses.values())).sum() / self._parts_of_a_batch
        if self.config.calculate_per_token_loss:
            total = total * assignment.tokens  # the optimizer step divides by the tokens of all ranks
        riding: Tensor = MoEAuxLossAutoScaler.apply(weights_TE, total)
        return riding

    def _router_parameters(self) -> Iterator[nn.Parameter]:
        yield from self.parameters()


def builder(name: str, *, config: RouterConfig | Mapping[str, Any] | None = None) -> Callable[..., MegatronRouter]:
    """What goes into `MoESubmodules(router=...)` for the router plug-in `name`.

    The gating is read from the TransformerConfig. Building raises ConfigError if that asks for a balancer of Megatron's
    as well, and UnsupportedError for a router that needs another dispatcher.
    """
    return partial(_build, name, config)


def _build(
    name: str,
    router_config: RouterConfig | Mapping[str, Any] | None,
    *,
    config: Any,
    pg_collection: Any,
    is_mtp_layer: bool = False,  # newer than 0.16: Megatron's main branch hands it in
) -> MegatronRouter:
    asked = dict(vars(config))
    if asked["moe_router_load_balancing_type"] != "sinkhorn":
        del asked["moe_router_load_balancing_type"]  # the others do nothing without a coefficient
    expect_neutral(asked, _NEUTRAL, where="TransformerConfig")
    router = moerouters.build(name, gating_of(config), config=router_config)
    return MegatronRouter(router, config, pg_collection)


def gating_of(config: Any) -> Gating:
    """The gating that a TransformerConfig describes; equal to Megatron's in bits if moe_router_dtype is fp32 or fp64.

    Otherwise Megatron rounds scores to bfloat16 before it compares them; here they stay float32.
    """
    E, K = config.num_moe_experts, config.moe_router_topk
    settings: dict[str, Any] = {"ties": "torch", "scale": config.moe_router_topk_scaling_factor or 1.0}
    kept = config.moe_router_group_topk
    if kept:
        scored_by = {1: "max", 2: "top2_sum"}.get(K // kept)
        if scored_by is None:
            raise UnsupportedError(
                f"groups of experts are scored by the sum of their best {K // kept}.",
                where=f"moe_router_topk={K}, moe_router_group_topk={kept}",
                why="moerouters knows the best one and the sum of the best two",
                fix="choose moe_router_group_topk so that their quotient is 1 or 2",
            )
        settings |= {"num_groups": config.moe_router_num_groups, "kept_groups": kept, "group_score": scored_by}
    if config.moe_router_score_function == "sigmoid":
        return Gating.sigmoid(E, K, renormalize=K > 1, **settings)
    if config.moe_router_score_function != "softmax":
        raise UnsupportedError(
            f"the score function {config.moe_router_score_function!r} is not known here.",
            where="moe_router_score_function",
            why="it is read for megatron-core 0.16, which has softmax and sigmoid",
            fix="use one of these",
        )
    if config.moe_router_pre_softmax:
        return Gating.softmax(E, K, renormalize=False, **settings)
    return Gating.softmax_after_topk(E, K, **settings)


def attach(
    optimizer: Any, model: nn.Module | Sequence[nn.Module], *, token_group: dist.ProcessGroup | None = None
) -> Handle | None:
    """As `moerouters.attach`, for Megatron's optimizer and its list of model chunks; None if they hold no router.

    token_group defaults to the ranks of this pipeline stage: under sequence, context and data parallelism each of them
    has tokens of its own. A step that Megatron skips for infinite gradients updates nothing.
    """
    whole = as_one(model)
    routers = [module for module in whole.modules() if isinstance(module, MegatronRouter)]
    if not routers:
        return None
    group = token_group or routers[0].distinct_tokens
    return moerouters.attach(_torch_optimizers(optimizer), whole, token_group=group)


def _torch_optimizers(optimizer: Any) -> list[Optimizer]:
    """The torch optimizers inside Megatron's, which have hooks and are not called for a skipped step."""
    if isinstance(optimizer, Optimizer):
        return [optimizer]
    chained = getattr(optimizer, "chained_optimizers", None)
    if chained is not None:
        return [inner for each in chained for inner in _torch_optimizers(each)]
    return [] if optimizer.optimizer is None else [optimizer.optimizer]
