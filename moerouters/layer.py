"""A mixture-of-experts layer on one page.

x_TD --gate--> logits_TE --router--> Assignment --plan--> DispatchPlan
     --dispatch--> x_RD --experts--> y_RD --combine--> y_TD       (from the plan on: moerouters/dispatch/run.py)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moerouters.autocast import no_autocast
from moerouters.capacity import DropPolicy, limit_capacity
from moerouters.dispatch.base import Dispatcher
from moerouters.dispatch.local import LocalDispatcher
from moerouters.dispatch.places import Places
from moerouters.dispatch.run import through_experts
from moerouters.errors import ConfigError, ShapeError
from moerouters.experts import GroupedExperts
from moerouters.kernels.grouped_gemm import Activation
from moerouters.losses import LossMode
from moerouters.routed import RoutedModule
from moerouters.router import Router
from moerouters.types import Assignment, RouteContext


class MoEOutput(NamedTuple):
    """What a MoELayer returns."""

    hidden: Tensor
    """In the shape and dtype of the input."""
    assignment: Assignment
    """Who went where. With loss_mode='collect' add `assignment.losses` to the training loss."""


class MoELayer(RoutedModule):
    """Gate, router, experts. Takes [T, D] or [B, S, D]; D is `hidden_size`, each expert is `expert_size` wide.

    loss_mode: `collect` hands the router's losses out in the assignment, `inject` feeds them to the backward pass (see
    `moerouters.losses`). capacity_factor: None drops nothing; c keeps ceil(c * T * K / E) tokens per expert.
    shared_size: width of a shared expert that sees every token; 0 for none. dispatcher: how tokens reach experts; if
    that is over several ranks, this layer holds the experts of this rank (see `moerouters.shard_experts`).
    """

    def __init__(
        self,
        router: Router,
        *,
        hidden_size: int,
        expert_size: int,
        activation: Activation = "swiglu",
        shared_size: int = 0,
        capacity_factor: float | None = None,
        drop_policy: DropPolicy = "position",
        loss_mode: LossMode = "collect",
        dispatcher: Dispatcher | None = None,
    ) -> None:
        super().__init__()
        num_experts = router.gating.num_experts
        self.gate = nn.Linear(hidden_size, num_experts, bias=False)
        dispatcher = LocalDispatcher() if dispatcher is None else dispatcher
        self.experts = GroupedExperts(
            num_experts // dispatcher.num_ranks, hidden_size=hidden_size, expert_size=expert_size, activation=activation
        )
        self.shared = (
            GroupedExperts(1, hidden_size=hidden_size, expert_size=shared_size, activation=activation)
            if shared_size
            else None
        )
        self.capacity_factor = capacity_factor
        self.drop_policy: DropPolicy = drop_policy
        self._set_router(router, hidden_size=hidden_size, loss_mode=loss_mode)
        self.set_dispatcher(dispatcher)

    def forward(self, x: Tensor, ctx: RouteContext = RouteContext()) -> MoEOutput:
        if x.shape[-1] != self.gate.in_features:
            raise ShapeError(
                f"the layer got hidden states of width {x.shape[-1]}, it was built with {self.gate.in_features}.",
                why="x is [tokens, hidden_size] or [batch, sequence, hidden_size]",
                fix=f"build the layer with hidden_size={x.shape[-1]}",
            )
        x_TD = x.reshape(-1, x.shape[-1])
        ctx = _with_layer_context(ctx, x, x_TD)

        logits_TE = self._logits(x_TD, ctx.valid_T)
        assignment = self._assign(logits_TE, ctx)
        capacity = self._capacity(x_TD.shape[0])
        if capacity is not None:
            assignment = limit_capacity(assignment, capacity, self.drop_policy)
        assignment = self._account(assignment)
        y_TD = self._through_experts(
            self.dispatcher,
            x_TD,
            assignment,
            self.experts,
            capacity=capacity,
            chunks=self.chunks,
            beside=None if self.shared is None else self._shared,
            places=self.places,
        )
        return MoEOutput(y_TD.to(x.dtype).reshape(x.shape), assignment)

    def set_dispatcher(self, dispatcher: Dispatcher, *, chunks: int = 1, places: Places | None = None) -> None:
        """Let tokens travel by `dispatcher`, in `chunks` parts. The experts stay as they are: they must be those that
        live on this rank; places says which, where they are no contiguous block. Raises ConfigError where their number
        cannot be."""
        num_experts, here = self.router.gating.num_experts, self.experts.num_experts
        slices = getattr(dispatcher, "slices", 1)
        spread_over = dispatcher.num_ranks // slices
        wanted = num_experts if places is None else places.num_places
        if here * spread_over != wanted or slices != self.experts.slices:
            raise ConfigError(
                f"the layer holds {here} experts, the dispatcher reaches {dispatcher.num_ranks} ranks, and the router "
                f"chooses among {num_experts}" + ("." if places is None else f", placed in {places.num_places} slots."),
                why="every rank of the group holds num_experts / ranks experts",
                fix="let moerouters.shard_experts(model, group) split the experts and set the dispatcher",
            )
        self.dispatcher, self.chunks, self.places = dispatcher, chunks, places
        self._through_experts = through_experts
        if dispatcher.num_ranks > 1:
            from moerouters.dispatch.eager import through_experts_eager

            self._through_experts = through_experts_eager

    def _shared(self, x_TD: Tensor) -> Tensor:
        assert self.shared is not None
        everything = torch.full((1,), x_TD.shape[0], dtype=torch.int64, device=x_TD.device)
        y_TD: Tensor = self.shared(x_TD, everything)
        return y_TD

    def _logits(self, x_TD: Tensor, valid_T: Tensor | None = None) -> Tensor:
        """The gate projection in float32 (float64 for float64), also under autocast: bf16 logits tie and flip ids."""
        if valid_T is not None:
            # Padding may hold NaN (attention over nothing), and 0 * NaN would reach the gradient of the gate's weight.
            x_TD = torch.where(valid_T.unsqueeze(1), x_TD, 0.0)
        dtype = torch.float64 if x_TD.dtype == torch.float64 else torch.float32
        with no_autocast(x_TD.device):
            return F.linear(x_TD.to(dtype), self.gate.weight.to(dtype))

    def _router_parameters(self) -> Iterator[nn.Parameter]:
        yield from self.gate.parameters()
        yield from self.router.parameters()

    def _capacity(self, num_tokens: int) -> int | None:
        if self.capacity_factor is None:
            return None
        gating = self.router.gating
        return math.ceil(self.capacity_factor * num_tokens * gating.top_k / gating.num_experts)


def _with_layer_context(ctx: RouteContext, x: Tensor, x_TD: Tensor) -> RouteContext:
    """Add what only the layer knows: its input, and for [B, S, D] which sequence a token belongs to."""
    if ctx.hidden_TD is None:
        ctx = replace(ctx, hidden_TD=x_TD)
    if ctx.sequence_ids_T is None and x.dim() == 3:
        B, S = x.shape[0], x.shape[1]
        ids_T = torch.arange(B, device=x.device).unsqueeze(1).expand(B, S).reshape(-1)
        ctx = replace(ctx, sequence_ids_T=ids_T, num_sequences=B)
    return ctx
