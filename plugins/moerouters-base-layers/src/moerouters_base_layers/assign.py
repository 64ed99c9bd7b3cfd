"""The balanced assignment problem of BASE layers (arXiv:2103.16716), for any K and any number of tokens.

    max  sum_te s_te x_te   subject to   sum_e x_te = K for every token,
                                         floor(n K / E) <= sum_t x_te <= ceil(n K / E) for every expert

Three steps, all with a number of operations that the host knows:

1. Prices, by a few steps of coordinate descent on the dual (core's operator `dual_update`). They take the place of
   epsilon scaling: from them the auction needs 1 to 56 rounds to its end (half of 24 problems: 3 or fewer). From prices
   of 0, with an epsilon that falls by 4 from a quarter of the span to the same end, it needs 46 to 274.
2. Auction rounds from those prices (`auction`).
3. Places that are still empty are filled expert by expert (`placing`). An assignment that the auction has completed
   stays as it is.

Loads that may be the floor or the ceiling become loads that are all the ceiling by one more row. It stands for no
token, is worth 0 everywhere, and takes the places that are too many, no two at one expert. In names U is T + 1, the
tokens and this row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moerouters.kernels.dual import dual_update
from moerouters_base_layers.auction import auction
from moerouters_base_layers.bidding import best_of
from moerouters_base_layers.placing import place

DUAL_ITERATIONS = 8
"""With 16 rounds after it, 4 leave a mean of 0.08% of the best sum unreached, 8 and 16 less than 0.0001% (README)."""


def balanced_assignment(scores_TE: Tensor, *, top_k: int, rounds: int = 16, valid_T: Tensor | None = None) -> Tensor:
    """bool [T, E]: K experts for every token that counts, none for the others; loads differ by one at most.

    Near the largest sum of scores (README, measured). scores_TE: float32 or float64, finite where valid_T (bool [T],
    None: everywhere) is True and never read elsewhere. No gradient, no host synchronisation, the same bits each time.
    """
    if valid_T is None:
        valid_T = torch.ones(scores_TE.shape[0], dtype=torch.bool, device=scores_TE.device)
    if top_k >= scores_TE.shape[1]:
        return valid_T.unsqueeze(1).expand_as(scores_TE).clone()
    chosen_TE: Tensor = _assign(scores_TE.detach(), valid_T, top_k, rounds)
    return chosen_TE


@torch.library.custom_op("moerouters_base_layers::assign", mutates_args=())
def _assign(scores_TE: Tensor, valid_T: Tensor, top_k: int, rounds: int) -> Tensor:
    """One operator for tracers: unrolled, 16 rounds and 64 experts would be a graph of a thousand nodes."""
    T, E = scores_TE.shape
    # What a token holds against all experts alike decides nothing, and costs bits.
    values_TE = scores_TE - scores_TE.amax(dim=1, keepdim=True)
    values_TE = torch.where(valid_T.unsqueeze(1), values_TE, 0.0)
    price_E = dual_update(
        values_TE, values_TE.new_zeros(E), top_k=top_k, iterations=DUAL_ITERATIONS, centred=True, valid_T=valid_T
    )
    pairs = valid_T.sum() * top_k
    capacity = (pairs + E - 1) // E
    values_UE = torch.cat([values_TE, values_TE.new_zeros(1, E)])
    demand_U = torch.cat([valid_T * top_k, (capacity * E - pairs).reshape(1)])
    held_UE, price_E = auction(values_UE, demand_U, capacity, price_E, top_k=top_k, rounds=rounds)
    if held_UE.device.type == "cpu" and torch.equal(held_UE.sum(dim=1), demand_U):
        return held_UE[:T].contiguous()  # what `place` would come to

    # Dear experts first: the last ones take what is left, and those have room for anybody.
    order_E = price_E.argsort(descending=True, stable=True)
    # By how much an expert is worth more to a row than the middle between the last it would take and the next.
    worth_UE = values_UE - price_E
    _, last_U1, next_U1 = best_of(worth_UE, demand_U, top_k=top_k, tokens=T)
    margin_UE = worth_UE - (last_U1 + next_U1) / 2
    margin_EU, held_EU = margin_UE.t().index_select(0, order_E), held_UE.t().index_select(0, order_E)
    chosen_EU = place(margin_EU, held_EU, demand_U, capacity).index_select(0, order_E.argsort())
    return chosen_EU[:, :T].t().contiguous()


@_assign.register_fake
def _(scores_TE: Tensor, valid_T: Tensor, top_k: int, rounds: int) -> Tensor:
    return torch.empty_like(scores_TE, dtype=torch.bool, memory_format=torch.contiguous_format)
