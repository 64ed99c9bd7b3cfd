"""What experts bid for tokens, from a routing that is done: nothing is sorted a second time."""

from __future__ import annotations

from torch import Tensor

from moerouters import Gating, RouteContext, Routing
from moerouters_bip.columns import LOWEST
from moerouters_bip.dual import Variant, bids_of, token_threshold


def bids_of_routing(
    routing: Routing, ctx: RouteContext, gating: Gating, *, variant: Variant = "centred"
) -> tuple[Tensor, Tensor]:
    """(bids [E, T] in the dtype of the scores, -inf where there are none; how many tokens count, int64 0-d).

    A token counts if it is valid and could have had another expert. Its threshold lies between its last chosen expert
    and the next one, by the scores it was routed by: `adjusted_TE`, or else scores + bias_E.
    """
    assert ctx.valid_T is not None and routing.cutoff_T is not None
    scores_TE = gating.corrected(routing.scores_TE.detach())
    last_T1 = routing.expert_ids_TK[:, -1:].clamp_max(gating.num_experts - 1)
    if routing.adjusted_TE is not None:
        upper_T = routing.adjusted_TE.gather(1, last_T1).squeeze(1)
    else:
        assert routing.bias_E is not None
        upper_T = (scores_TE.gather(1, last_T1) + routing.bias_E[last_T1]).squeeze(1)
    counted_T = ctx.valid_T & (routing.cutoff_T > LOWEST)
    p_T = token_threshold(upper_T, routing.cutoff_T, variant).masked_fill(~counted_T, 0.0)
    return bids_of(scores_TE, p_T, counted_T), counted_T.sum()
