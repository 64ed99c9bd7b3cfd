"""Dual iterations of the balanced assignment problem (arXiv:2502.15451).

    max  sum_te s_te x_te   subject to   sum_e x_te = K for every token,   sum_t x_te = n K / E for every expert

Its Lagrange dual is D(p, q) = K sum_t p_t + (n K / E) sum_e q_e + sum_te max(0, s_te - p_t - q_e). For a fixed q the
best p_t is any point between the K-th and the (K+1)-th largest of s_t - q; for a fixed p the best q_e is the
corresponding order statistic of column e of s - p. Alternating the two is coordinate descent on D; a token then goes
to its K largest s - q, and only q, one number per expert, is kept. The gradient of min_p D(p, q) by q_e is n K / E
minus the tokens that choose e: a step lowers q where too few come, and raises it where too many do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from moerouters.kernels.dual import dual_update
from moerouters.kernels.overshoot import overshoot
from moerouters_bip.columns import LOWEST, Falling, LocalColumns, MakeColumns

Variant = Literal["centred", "published"]


def solve_dual(
    scores_TE: Tensor,
    dual_E: Tensor,
    *,
    top_k: int,
    iterations: int,
    variant: Variant = "centred",
    valid_T: Tensor | None = None,
    limit: Callable[[Tensor], Tensor] | None = None,
    columns: MakeColumns = LocalColumns,
) -> Tensor:
    """q after `iterations` dual steps from dual_E, in the dtype of the scores (float32 or float64); [E].

    valid_T: bool [T], tokens that count (padding does not). limit: maps s - q to itself with -inf outside a token's
    kept groups (`Gating.limit`). Tokens without a (K+1)-th candidate have nothing to decide and are left out; with no
    token left, or K = E, dual_E comes back unchanged. Any n K / E: ranks are fractional where it is not whole.
    columns: whose tokens are balanced, by default those of this rank. If those of several ranks, each calls this with
    its own tokens, also if it has none, and all get the same q.
    """
    T, E = scores_TE.shape
    start_E = dual_E.to(scores_TE.dtype)
    if columns is LocalColumns and (limit is None or T == 0):
        return dual_update(
            scores_TE, dual_E, top_k=top_k, iterations=iterations, centred=variant == "centred", valid_T=valid_T
        )
    if top_k >= E:
        return start_E
    if valid_T is None:
        valid_T = torch.ones(T, dtype=torch.bool, device=scores_TE.device)
    q_E = start_E
    for n in range(iterations):
        candidates_TE = scores_TE - q_E
        if limit is not None:
            candidates_TE = limit(candidates_TE)
        top_TK = candidates_TE.topk(top_k + 1, dim=-1).values
        counted_T = valid_T & (top_TK[:, top_k] > LOWEST)
        # What a token that does not count holds is never read, but must not be NaN: -inf - -inf is.
        top_TK = torch.where(counted_T.unsqueeze(1), top_TK, 0.0)
        p_T = token_threshold(top_TK[:, top_k - 1], top_TK[:, top_k], variant)
        excess_ET = bids_of(scores_TE, p_T, counted_T)
        # No place past T K / E + 1 is ever asked for, which is known on the host.
        bids = columns(excess_ET, counted_T.sum(), centre_E=q_E, most=(T * top_k) // E + 1)
        new_E = expert_threshold(bids, q_E, top_k=top_k, variant=variant)
        if n and variant == "centred":
            new_E = new_E + overshoot(bids.wanted_E, bids.tokens, top_k).to(q_E.dtype) * (new_E - q_E)
        q_E = centred(new_E, bids.tokens) if variant == "centred" else new_E
    return q_E


def dual_objective(scores_TE: Tensor, dual_E: Tensor, *, top_k: int) -> Tensor:
    """0-d: min over p of D(p, q) = sum over tokens of the K largest s - q, plus (T K / E) sum(q).

    An upper bound on the score of every balanced assignment, tight at the optimal q (weak and strong duality).
    """
    T, E = scores_TE.shape
    best_TK = (scores_TE - dual_E).topk(top_k, dim=-1).values
    return best_TK.sum() + T * top_k / E * dual_E.sum()


def token_threshold(upper_T: Tensor, lower_T: Tensor, variant: Variant = "centred") -> Tensor:
    """p_T of each token's K-th and (K+1)-th largest s - q."""
    return lower_T.clamp_min(0) if variant == "published" else (upper_T + lower_T) / 2


def bids_of(scores_TE: Tensor, p_T: Tensor, counted_T: Tensor) -> Tensor:
    """s - p as [E, T], -inf for tokens that do not count.

    All experts bid for a token, also those outside its kept groups: which groups are kept depends on q, and an expert
    that only bids where its group already won would stay starved for ever.
    """
    return torch.where(counted_T.unsqueeze(1), scores_TE - p_T.unsqueeze(1), LOWEST).t().contiguous()


def expert_threshold(bids: Falling, q_E: Tensor, *, top_k: int, variant: Variant = "centred") -> Tensor:
    """The coordinate-minimising q: per expert the value that about tokens * K / E of its bids exceed; not centred yet.

    `bids.tokens` is a 0-d tensor, so places are found without a host synchronisation. An expert that no token may reach
    keeps its q, and so do all without tokens.
    """
    E, tokens = q_E.shape[0], bids.tokens
    if variant == "published":
        (new_E,) = bids.falling((tokens * top_k) // E, 1).clamp_min(0)
    else:
        # The middle of the gap between rank c and c + 1, c = tokens K / E, and its continuation to fractional c: place
        # c + 1/2 counted from 1. A threshold that *is* a token's value would tie with that token; in the gap none does.
        doubled = 2 * tokens * top_k + E
        rank = torch.div(doubled, 2 * E, rounding_mode="floor")
        fraction = (doubled % (2 * E)).to(q_E.dtype) / (2 * E)
        upper_E, lower_E = bids.falling(rank - 1, 2)
        new_E = upper_E + (lower_E - upper_E) * fraction
    return torch.where((bids.places_E > 0) & (tokens > 0), new_E, q_E)


def centred(q_E: Tensor, tokens: Tensor) -> Tensor:
    """q with mean 0, unless there are no tokens. Top-K sees differences of q only; a common offset would drift."""
    return torch.where(tokens > 0, q_E - q_E.mean(), q_E)
