"""RemoeRouter: a token's experts are those whose relu score is positive; an L1 loss keeps K of them on average."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from moerouters import Capabilities, Gating, LoadScope, RouteContext, Router, Routing, Selection, StateAlgebra
from moerouters.errors import ConfigError
from moerouters_remoe.config import LEAST, MOST, RemoeConfig


class RemoeRouter(Router):
    """Experts come and go where their weight is 0, so the layer is continuous in the logits (arXiv:2412.14711).

    The assignment has E slots, in order of expert id, of which the inactive are empty: how many are filled follows from
    the data, up to all of them. K of the gating is the mean number of active experts that is aimed at.

    State: `l1_scale`, float32 0-d, the coefficient of the L1 loss. It moves once per optimizer step, by the int64 count
    of active pairs over all micro-batches and ranks.

    Raises ConfigError for a gating whose weights are not its relu scores.
    """

    capabilities = Capabilities(state=StateAlgebra.ADDITIVE, load_scope=LoadScope.GLOBAL)
    reads: ClassVar[frozenset[str]] = frozenset()
    l1_scale: Tensor

    def __init__(self, gating: Gating, config: RemoeConfig = RemoeConfig()) -> None:
        super().__init__(gating)
        self.config = config
        _refuse_other_weights(gating)
        self.register_state("l1_scale", fill=config.initial)

    def select(self, adjusted_TE: Tensor, ctx: RouteContext) -> Selection:
        E = self.gating.num_experts
        # Closed groups stand at -inf. NaN is active: a broken row is to show in the output, not to become a zero.
        inactive_TE = self.gating.limit(adjusted_TE) <= 0
        return Selection.slots(torch.where(inactive_TE, E, torch.arange(E, device=adjusted_TE.device)))

    def losses(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        assert ctx.valid_T is not None  # the template fills it in
        E, K = self.gating.num_experts, self.gating.top_k
        tokens = ctx.valid_T.sum().clamp_min(1)
        scores_TE = torch.where(ctx.valid_T.unsqueeze(1), routing.scores_TE, 0.0)
        fraction_E = (routing.load_E * E).to(scores_TE.dtype) / (K * tokens)
        return {"l1": self.l1_scale * (fraction_E * scores_TE.sum(dim=0)).sum() / tokens}

    def observe(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        assert ctx.valid_T is not None
        # Sparsity minus its target is -surplus / (T E): a sign of integers never flips by rounding.
        return {"surplus": routing.load_E.sum() - self.gating.top_k * ctx.valid_T.sum()}

    def update(self, stats: Mapping[str, Tensor]) -> None:
        """Move the coefficient by one factor. `stats` holds surplus, int64 0-d; 0 changes nothing."""
        sign = stats["surplus"].sign().to(torch.float32)
        self.l1_scale.mul_(self.config.factor**sign).clamp_(LEAST, MOST)


def _refuse_other_weights(gating: Gating) -> None:
    settings = gating.settings
    problems = {
        f"score={settings.score!r}": settings.score != "relu",
        "renormalize=True": settings.renormalize,
        "correction_bias=True": settings.correction_bias,
    }
    found = [name for name, wrong in problems.items() if wrong]
    if found:
        raise ConfigError(
            "router 'remoe' needs a gating whose weights are its relu scores.",
            where=f"gating with {', '.join(found)}",
            why="an expert joins or leaves a token where its weight is 0; any other weight jumps there",
            fix="Gating.relu(num_experts, top_k), where top_k is the mean number of experts to aim at",
        )
