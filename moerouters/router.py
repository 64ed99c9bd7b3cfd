"""Router: the template every router fills in. Override only the stages you change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, final

import torch
import torch.distributed as dist
from torch import Tensor

from moerouters.autocast import no_autocast
from moerouters.capabilities import Capabilities
from moerouters.errors import UnsupportedError
from moerouters.gating import Gating, take_along_experts
from moerouters.kernels.counts import count_experts
from moerouters.kernels.gating import finite_rows, fused_gating, kernel_fits
from moerouters.kernels.topk import SMALL
from moerouters.state import StatefulModule
from moerouters.types import Assignment, RouteContext, Routing, Selection, check_context


class Router(StatefulModule):
    """Chooses experts for tokens.

        logits_TE --gating.prepare, score--> scores_TE --bias_E, adjust--> adjusted_TE --select--> ids
                  --gating.weigh(scores_TE)--> weights --losses, observe--> Assignment

    `forward` is pure: the same input, state and context give the same bits, and nothing is written. State changes only
    in `update`, once per optimizer step. In every stage `ctx.valid_T` is a tensor: False for padding and for tokens
    whose logits are not finite; and `ctx.logits_TE` holds the logits in the compute dtype.
    """

    capabilities: Capabilities = Capabilities()
    """What this router promises; an instance may set its own where a config changes the promise."""
    reads: ClassVar[frozenset[str]] = frozenset({"adjusted_TE", "cutoff_T"})
    """Optional fields of Routing that losses and observe read; what is not read is not computed."""

    token_group: dist.ProcessGroup | None = None
    """Ranks with distinct tokens, for routers that declare `forward_collective`; `attach` sets it. None: the world."""
    alone: bool = False
    """True for a pass that no other rank makes, while a layer is built: it talks to nobody."""

    def __init__(self, gating: Gating) -> None:
        super().__init__()
        self.gating = gating

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave the process group behind: it belongs to this process."""
        return self.__dict__ | {"token_group": None}

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if "forward" in cls.__dict__:
            raise TypeError(f"{cls.__name__} overrides Router.forward, which is final: override a stage instead")

    # The stages, in the order of the flow.

    def bias_E(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor | None:
        """[E], added to every token's scores before selection; None for no bias. Never carries a gradient.

        The scores it gets hold the model's own correction bias, if the gating has one.
        """
        return None

    def adjust(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        """[T, E] scores that selection uses; gets the scores with `bias_E` already added. -inf is never chosen."""
        return scores_TE

    def select(self, adjusted_TE: Tensor, ctx: RouteContext) -> Selection:
        """Choose experts from adjusted scores (no gradient flows through them).

        Default: top-k inside the groups the gating allows, slots by falling adjusted score.
        """
        K, E = self.gating.top_k, self.gating.num_experts
        limited_TE = self.gating.limit(adjusted_TE)
        wanted = K + 1 if K < E and "cutoff_T" in self.reads else K
        ids = self.gating.top(limited_TE, wanted)
        top = take_along_experts(limited_TE, ids)
        ids_TK = torch.where(top[:, :K] == -float("inf"), E, ids[:, :K])
        if "cutoff_T" not in self.reads:
            return Selection.slots(ids_TK)
        return Selection.slots(ids_TK, top[:, K] if K < E else top.new_full((top.shape[0],), -float("inf")))

    def losses(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        """0-d losses, scaled by the router's own coefficients. Called in training only; always the same names."""
        return {}

    def observe(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        """What `update` needs of this forward: tensors of fixed shape that add up over micro-batches and ranks.

        Called in training only, and not for forced assignments. Integers stay integers.
        """
        return {}

    def update(self, stats: Mapping[str, Tensor]) -> None:
        """Learn from the sums of `observe` over one optimizer step and all ranks; write state buffers in place.

        Not called after a step in which every assignment was forced; the sums may still hold no token at all.
        """

    # The template.

    @final  # type: ignore[misc]  # nn.Module declares forward as an attribute; __init_subclass__ enforces it as well
    def forward(self, logits_TE: Tensor, ctx: RouteContext = RouteContext()) -> Assignment:
        """Route [T, E] logits. Returns an Assignment whose losses and stats are empty in eval mode."""
        # Under autocast a matrix product in a plugin's loss would round loads to bfloat16, 8 bits.
        with no_autocast(logits_TE.device):
            return self._route(logits_TE, ctx)

    def _route(self, raw_TE: Tensor, ctx: RouteContext) -> Assignment:
        self._check_dtype(raw_TE)
        check_context(ctx, num_tokens=raw_TE.shape[0])
        if self._fuses(raw_TE, ctx):
            return self._route_fused(raw_TE, ctx)
        logits_TE, scores_TE, finite_T, stage_ctx = self._score(raw_TE, ctx)

        bias_E: Tensor | None = None
        adjusted_TE: Tensor | None = None
        if ctx.forced_ids_TK is not None:
            selection = Selection.slots(ctx.forced_ids_TK)
        else:
            with torch.no_grad():
                bias_E, adjusted_TE = self._adjusted(scores_TE.detach(), stage_ctx)
                selection = self.select(adjusted_TE, stage_ctx)
        if ctx.valid_T is not None:
            selection = self._without_padding(selection, ctx.valid_T)
        weights = self._weigh(scores_TE, selection, finite_T)
        routing = Routing(
            logits_TE=logits_TE, scores_TE=scores_TE, bias_E=bias_E, selection=selection, weights=weights,
            load_E=count_experts(selection.expert_ids, self.gating.num_experts),
            adjusted_TE=adjusted_TE if "adjusted_TE" in self.reads else None,
        )  # fmt: skip
        assignment = self._assignment(selection, weights, routing.load_E, finite_T=finite_T, valid_T=ctx.valid_T)
        return self._with_results(assignment, routing, stage_ctx, forced=ctx.forced_ids_TK is not None)

    def _score(self, raw_TE: Tensor, ctx: RouteContext) -> tuple[Tensor, Tensor, Tensor, RouteContext]:
        """(logits_TE, scores_TE, finite_T, context of the stages)."""
        if ctx.valid_T is not None:
            # Whatever padding holds, NaN included: scores would differentiate it to 0 * NaN, which is NaN.
            raw_TE = torch.where(ctx.valid_T.unsqueeze(1), raw_TE, 0.0)
        logits_TE = self.gating.prepare(raw_TE)
        finite_T = finite_rows(raw_TE.detach())  # before the soft cap, which makes infinity finite
        valid_T = finite_T if ctx.valid_T is None else finite_T & ctx.valid_T
        return logits_TE, self.gating.score(logits_TE), finite_T, replace(ctx, valid_T=valid_T, logits_TE=logits_TE)

    def _fuses(self, raw_TE: Tensor, ctx: RouteContext) -> bool:
        """Whether one operator does it all: stages and gating are those of core, and nobody reads what lies between.

        On a CPU that saves memory traffic alone, and only where nothing needs scores of all experts as well.
        """
        steps = ("adjust", "select", "_adjusted", "_weigh", "_without_padding")
        if not self.gating.fusable or ctx.forced_ids_TK is not None or self._overrides(*steps):
            return False
        if raw_TE.dim() != 2 or raw_TE.shape[1] != self.gating.num_experts:
            return False  # `prepare` says what is wrong
        if raw_TE.device.type == "cuda":
            return kernel_fits(raw_TE, self.gating.rule) and not (self._learns and "adjusted_TE" in self.reads)
        aside = torch.compiler.is_compiling() or raw_TE.numel() <= SMALL
        return raw_TE.device.type == "cpu" and not (aside or self._learns or self._overrides("bias_E"))

    def _route_fused(self, raw_TE: Tensor, ctx: RouteContext) -> Assignment:
        """As `_route`; scores are made only for stages that a subclass has."""
        logits_TE = scores_TE = bias_E = None
        stage_ctx = ctx
        if self._learns or self._overrides("bias_E"):
            logits_TE, scores_TE, _, stage_ctx = self._score(raw_TE, ctx)
            with torch.no_grad():
                bias_E = self.bias_E(self.gating.corrected(scores_TE.detach()), stage_ctx)
        cutoff = self._learns and "cutoff_T" in self.reads
        gated = fused_gating(
            raw_TE,
            self.gating.rule,
            correction_E=self.gating.correction_bias_E if self.gating.settings.correction_bias else None,
            bias_E=bias_E,
            valid_T=ctx.valid_T,
            cutoff=cutoff,
        )
        selection = Selection.slots(gated.expert_ids_TK, gated.cutoff_T if cutoff else None)
        assignment = self._assignment(
            selection, gated.weights_TK, gated.load_E, finite_T=gated.finite_T, valid_T=ctx.valid_T
        )
        if logits_TE is None or scores_TE is None:
            return assignment
        routing = Routing(
            logits_TE=logits_TE, scores_TE=scores_TE, adjusted_TE=None, bias_E=bias_E, selection=selection,
            weights=gated.weights_TK, load_E=gated.load_E,
        )  # fmt: skip
        return self._with_results(assignment, routing, stage_ctx, forced=False)

    def _adjusted(self, scores_TE: Tensor, ctx: RouteContext) -> tuple[Tensor | None, Tensor]:
        scores_TE = self.gating.corrected(scores_TE)
        bias_E = self.bias_E(scores_TE, ctx)
        return bias_E, self.adjust(scores_TE if bias_E is None else scores_TE + bias_E, ctx)

    def _weigh(self, scores_TE: Tensor, selection: Selection, finite_T: Tensor) -> Tensor:
        if selection.token_ids_N is not None:
            weights = self.gating.weigh_pairs(scores_TE, selection.token_ids_N, selection.expert_ids)
            finite = finite_T.index_select(0, selection.token_ids_N)
        else:
            weights = self.gating.weigh(scores_TE, selection.expert_ids)
            finite = finite_T.unsqueeze(1)
        # A sigmoid would weigh the finite experts of a broken row as if all were well, and the gate would train on.
        taken = selection.expert_ids < self.gating.num_experts
        return torch.where(finite | ~taken, weights, float("nan"))

    def _without_padding(self, selection: Selection, real_T: Tensor) -> Selection:
        real = real_T.unsqueeze(1) if selection.token_ids_N is None else real_T.index_select(0, selection.token_ids_N)
        return replace(selection, expert_ids=torch.where(real, selection.expert_ids, self.gating.num_experts))

    def _assignment(
        self, selection: Selection, weights: Tensor, load_E: Tensor, *, finite_T: Tensor, valid_T: Tensor | None
    ) -> Assignment:
        broken_T = ~finite_T
        return Assignment(
            kind=selection.kind,
            num_tokens=finite_T.shape[0],
            num_experts=self.gating.num_experts,
            expert_ids=selection.expert_ids,
            weights=weights,
            token_ids_N=selection.token_ids_N,
            load_E=load_E,
            tokens=(finite_T if valid_T is None else finite_T & valid_T).sum(),
            nonfinite=(broken_T if valid_T is None else broken_T & valid_T).sum(),
            losses={},
            stats={},
        )

    def _with_results(self, assignment: Assignment, routing: Routing, ctx: RouteContext, *, forced: bool) -> Assignment:
        if not self.training:
            return assignment
        losses = self.losses(routing, ctx)
        return replace(assignment, losses=losses, stats={} if forced else _detached(self.observe(routing, ctx)))

    @property
    def _learns(self) -> bool:
        return self.training and self._overrides("losses", "observe")

    def _overrides(self, *stages: str) -> bool:
        return any(getattr(type(self), stage) is not getattr(Router, stage) for stage in stages)

    def _check_dtype(self, logits_TE: Tensor) -> None:
        name = str(logits_TE.dtype).removeprefix("torch.")
        if name not in self.capabilities.dtypes:
            raise UnsupportedError(
                f"{type(self).__name__} was given {name} logits.",
                why=f"it declares {', '.join(sorted(self.capabilities.dtypes))}",
                fix="cast the logits, float32 is what gates usually give",
            )

    def extra_repr(self) -> str:
        config = getattr(self, "config", None)
        return "" if config is None else f"config={config!r}"


def _detached(stats: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in stats.items()}
