"""HashRouter: experts by the hash of a token's vocabulary id. Nothing is learned, so nothing can collapse."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from moerouters import Capabilities, Gating, RouteContext, Router, Selection
from moerouters.errors import ConfigError
from moerouters_hash.balanced import UNSEEN, balanced_table
from moerouters_hash.config import HashConfig
from moerouters_hash.mixing import hashed_experts


class HashRouter(Router):
    """K different experts of each vocabulary id, whatever its neighbours, its position and the gate say.

    The weights are the gating's, of the scores of these experts. Under a renormalised gating with K = 1 the weight is
    1, as in the paper, which has no gate (arXiv:2106.04426).

    Raises ContextError in forward without token_ids_T; ConfigError for a table under a gating that keeps to groups.
    """

    capabilities = Capabilities()
    reads: ClassVar[frozenset[str]] = frozenset()
    table_VK: Tensor | None
    """int64, with `frequencies`: the experts of each vocabulary id. It follows from the config, so it is no state and
    stays out of checkpoints."""

    def __init__(self, gating: Gating, config: HashConfig = HashConfig()) -> None:
        super().__init__(gating)
        self.config = config
        table_VK = None
        if config.frequencies:
            _refuse_groups(gating)
            table_VK = torch.empty(len(config.frequencies), gating.top_k, dtype=torch.int64)
        self.register_buffer("table_VK", table_VK, persistent=False)
        self.reset_state()

    def select(self, adjusted_TE: Tensor, ctx: RouteContext) -> Selection:
        token_ids_T = ctx.need("token_ids_T", router="hash")
        hashed_TK = self._hashed(token_ids_T)
        if self.table_VK is None:
            return Selection.slots(hashed_TK)
        V = self.table_VK.shape[0]
        table_TK = self.table_VK.index_select(0, token_ids_T.clamp(0, V - 1))
        in_table_T1 = ((token_ids_T >= 0) & (token_ids_T < V)).unsqueeze(1)
        return Selection.slots(torch.where(in_table_T1 & (table_TK != UNSEEN), table_TK, hashed_TK))

    def reset_state(self) -> None:
        """Work the table out again: memory that a meta device left empty holds anything."""
        super().reset_state()
        if self.table_VK is not None:
            table_VK = balanced_table(
                self.config.frequencies,
                num_experts=self.gating.num_experts,
                top_k=self.gating.top_k,
                seed=self.config.seed,
            )
            self.table_VK.copy_(torch.from_numpy(table_VK.copy()))

    def _hashed(self, token_ids_T: Tensor) -> Tensor:
        settings = self.gating.settings
        return hashed_experts(
            token_ids_T,
            num_experts=settings.num_experts,
            top_k=settings.top_k,
            seed=self.config.seed,
            num_groups=settings.num_groups,
            kept_groups=settings.kept_groups,
        )


def _refuse_groups(gating: Gating) -> None:
    settings = gating.settings
    if settings.kept_groups < settings.num_groups:
        raise ConfigError(
            "router 'hash' has no balanced table under a gating that keeps to groups.",
            where=f"gating with kept_groups={settings.kept_groups} of num_groups={settings.num_groups}",
            why="the experts with the least so far may stand in more groups than a token is allowed",
            fix="leave frequencies out: the plain hash keeps to groups",
        )
