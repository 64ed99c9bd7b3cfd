"""The online form (Algorithm 3 of arXiv:2502.15451): q moves with every token, and a token sees only those before it.

    p_t = between the K-th and the (K+1)-th largest of s_t - q
    add s_t - p_t to what the tokens so far have bid; with i of them, the next q is at place i K / E of each expert

The paper routes token t by the q that holds its own bid already. After the first token each expert has one bid, which
then is its q, and all experts tie; so here a token goes by the q of those before it.

A multiset that grows for ever has no fixed size. What is kept from step to step is q alone, and weighs in the next
batch as `memory` tokens do: q = (memory * q_kept + i * q_of_this_batch) / (memory + i).
"""

from __future__ import annotations

import math
from bisect import insort
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moerouters_bip.columns import LOWEST, LocalColumns
from moerouters_bip.dual import Variant, bids_of, centred, expert_threshold, token_threshold

Array = npt.NDArray[Any]


def online_prices(
    scores_TE: Tensor, dual_E: Tensor, valid_T: Tensor, *, top_k: int, memory: Tensor, variant: Variant = "centred"
) -> Tensor:
    """[T, E], the q that each token is routed by, in the dtype of the scores (float32 or float64). No gradient.

    dual_E: the q kept, and memory: float32 0-d, as how many tokens it weighs; with 0 the first token still goes by it.
    Tokens that do not count, and those with fewer than K+1 scores above -inf, move nothing.
    A loop in the interpreter on a CPU (64 experts: 0.16 ms a token on a busy core); elsewhere the reference below.
    """
    found: Tensor = _online_prices(
        scores_TE.detach(), dual_E.to(scores_TE.dtype), valid_T, memory, top_k, variant == "published"
    )
    return found


def mixed(batch_E: Tensor, tokens: Tensor, dual_E: Tensor, memory: Tensor) -> Tensor:
    """q after `tokens` tokens whose own q is batch_E: its mean with the q kept, weighted by tokens."""
    weight = memory.to(dual_E.dtype)
    mean_E = (weight * dual_E + tokens * batch_E) / (weight + tokens).clamp_min(1)
    return torch.where(tokens > 0, mean_E, dual_E)


@torch.library.custom_op("moerouters_bip::online_prices", mutates_args=())
def _online_prices(
    scores_TE: Tensor, dual_E: Tensor, valid_T: Tensor, memory: Tensor, top_k: int, published: bool
) -> Tensor:
    if scores_TE.device.type == "cpu":
        prices = _online_prices_numpy(
            scores_TE.numpy(), dual_E.numpy(), valid_T.numpy(), float(memory), top_k, published
        )
        return torch.from_numpy(prices)
    return online_prices_torch(
        scores_TE, dual_E, valid_T, top_k=top_k, memory=memory, variant="published" if published else "centred"
    )


@_online_prices.register_fake
def _(scores_TE: Tensor, dual_E: Tensor, valid_T: Tensor, memory: Tensor, top_k: int, published: bool) -> Tensor:
    return torch.empty_like(scores_TE)


def online_prices_torch(
    scores_TE: Tensor, dual_E: Tensor, valid_T: Tensor, *, top_k: int, memory: Tensor, variant: Variant
) -> Tensor:
    """Reference of `online_prices`: after each token an order statistic of all bids so far."""
    T, E = scores_TE.shape
    prices_TE = dual_E.expand(T, E).clone()
    if top_k >= E:
        return prices_TE
    bids_ET, counted_T = scores_TE.new_full((E, T), LOWEST), torch.zeros_like(valid_T)
    q_E = dual_E
    for t in range(T):
        prices_TE[t] = q_E
        now = slice(t, t + 1)
        upper, lower = (scores_TE[now] - q_E).topk(top_k + 1, dim=1).values[:, -2:].unbind(1)
        counted_T[now] = valid_T[now] & (lower > LOWEST)
        p = torch.where(counted_T[now], token_threshold(upper, lower, variant), 0.0)
        bids_ET[:, now] = bids_of(scores_TE[now], p, counted_T[now])
        tokens = counted_T.sum()
        bids = LocalColumns(bids_ET, tokens, centre_E=q_E, most=(T * top_k) // E + 1)
        batch_E = expert_threshold(bids, dual_E, top_k=top_k, variant=variant)
        new_E = mixed(batch_E, tokens, dual_E, memory)
        q_E = torch.where(counted_T[now], centred(new_E, tokens) if variant == "centred" else new_E, q_E)
    return prices_TE


def _online_prices_numpy(
    scores_TE: Array, dual_E: Array, valid_T: Array, memory: float, top_k: int, published: bool
) -> Array:
    """Each expert's highest bids in a sorted list, as many as are ever asked for: later on few of a token's enter."""
    T, E = scores_TE.shape
    prices_TE = np.empty_like(scores_TE)
    prices_TE[:] = dual_E
    if top_k >= E:
        return prices_TE
    kind = scores_TE.dtype.type
    kept = T * top_k // E + 2
    rising: list[list[float]] = [[] for _ in range(E)]
    q_E, weight, tokens = dual_E, kind(memory), 0
    two = [E - top_k - 1, E - top_k]
    for t in range(T):
        prices_TE[t] = q_E
        lower, upper = np.partition(scores_TE[t] - q_E, two)[two]
        if not valid_T[t] or lower == LOWEST:
            continue
        tokens += 1
        bids_E = scores_TE[t] - (max(lower, kind(0)) if published else (upper + lower) / 2)
        full = tokens > kept
        higher_E = np.flatnonzero(bids_E > [seen[0] for seen in rising]) if full else range(E)
        for e in higher_E:
            insort(rising[e], bids_E[e].item())
            del rising[e][:full]
        if published:
            batch_E = _falling(rising, tokens * top_k // E, dual_E, at_least=0.0)
        else:
            rank, rest = divmod(2 * tokens * top_k + E, 2 * E)
            upper_E, lower_E = _falling(rising, rank - 1, dual_E), _falling(rising, rank, dual_E)
            batch_E = upper_E + (lower_E - upper_E) * (kind(rest) / kind(2 * E))
        q_E = (weight * dual_E + kind(tokens) * batch_E) / max(weight + kind(tokens), kind(1))
        if not published:
            q_E = q_E - kind(torch.from_numpy(q_E).mean().item())  # torch's order of summation, for the same bits
    return prices_TE


def _falling(rising: list[list[float]], place: int, dual_E: Array, *, at_least: float = LOWEST) -> Array:
    """[E], each list's value at `place` from its end, 0 the last, or the nearest above -inf; dual_E without one."""
    at = max(len(rising[0]) - 1 - place, 0) if place > 0 else -1
    found_E = np.array([seen[at] for seen in rising], dual_E.dtype)
    for e in np.flatnonzero(found_E == LOWEST):
        found_E[e] = next((bid for bid in rising[e] if bid > LOWEST), math.nan)
    return np.where(np.isnan(found_E), dual_E, np.maximum(found_E, at_least))
