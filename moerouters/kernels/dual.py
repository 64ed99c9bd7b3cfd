"""Dual steps of an assignment problem with capacities: which price per expert makes all of them equally wanted?

    max  sum_te s_te x_te   subject to   sum_e x_te = K for every token,   sum_t x_te = n K / E for every expert

A step takes for each token a p between the K-th and the (K+1)-th largest of s - q, then for each expert a new q between
the c-th and the (c+1)-th largest of s - p, c = n K / E (coordinate descent on the dual; arXiv:2502.15451 and, with one
step per batch, quantile balancing). Tokens then go to the K largest s - q.

A step finds each q as if the p of its tokens stood still, though they move along by half of it, on the tokens between
two experts. So it falls short, and steps after the first go further (`overshoot`; plugins/moerouters-bip/SOLVERS.md).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moerouters.kernels.launch import triton_serves
from moerouters.kernels.order_statistic import AT_ONCE, LOWEST, falling_in_place
from moerouters.kernels.overshoot import FURTHER, overshoot
from moerouters.kernels.selection_network import token_cutoffs, work_size
from moerouters.kernels.threads import share_out
from moerouters.kernels.workspace import borrowed

Array = npt.NDArray[Any]


def dual_update(
    scores_TE: Tensor, dual_E: Tensor, *, top_k: int, iterations: int, centred: bool, valid_T: Tensor | None = None
) -> Tensor:
    """q after `iterations` steps from dual_E; [E], in the dtype of the scores (float32 or float64). No gradient.

    centred: thresholds in the middle of the gap between the two order statistics (on the line through them where
    n K / E is not whole), steps after the first go further, and the mean of q is kept at 0. Otherwise thresholds on the
    lower one, clipped at 0, as published.
    valid_T: bool [T], tokens that count; what the others hold is never read, and those that count hold neither NaN nor
    +inf. Left out as well are tokens with fewer than K+1 scores above -inf. Without any token, or with K = E, dual_E
    comes back; an expert that has no score above -inf keeps its q. No host synchronisation on a GPU.

    A CPU gives the bits of the reference. A GPU adds up the mean of q in another order.
    """
    start_E = dual_E.to(scores_TE.dtype)
    T, E = scores_TE.shape
    if T == 0 or top_k >= E:
        return start_E
    found: Tensor = _dual_update(scores_TE.detach(), start_E.detach(), valid_T, top_k, iterations, centred)
    return found


@torch.library.custom_op("moerouters::dual_update", mutates_args=())
def _dual_update(
    scores_TE: Tensor, dual_E: Tensor, valid_T: Tensor | None, top_k: int, iterations: int, centred: bool
) -> Tensor:
    if scores_TE.device.type == "cpu" and scores_TE.dtype in (torch.float32, torch.float64):
        return _dual_update_numpy(scores_TE, dual_E, valid_T, top_k, iterations, centred)
    if triton_serves(scores_TE, only=torch.float32):
        from moerouters.kernels.gpu.dual import dual_update as on_gpu

        return on_gpu(scores_TE, dual_E, valid_T, top_k, iterations, centred)
    return dual_update_torch(
        scores_TE, dual_E, top_k=top_k, iterations=iterations, centred=centred, valid_T=valid_T
    ).clone()  # what an operator returns is never its input


@_dual_update.register_fake
def _(scores_TE: Tensor, dual_E: Tensor, valid_T: Tensor | None, top_k: int, iterations: int, centred: bool) -> Tensor:
    return torch.empty_like(dual_E)


def dual_update_torch(
    scores_TE: Tensor, dual_E: Tensor, *, top_k: int, iterations: int, centred: bool, valid_T: Tensor | None = None
) -> Tensor:
    """Reference of `dual_update`: sorts every row and every column."""
    T, E = scores_TE.shape
    q_E = dual_E.to(scores_TE.dtype)
    if T == 0 or top_k >= E:
        return q_E
    for n in range(iterations):
        upper_T, lower_T = (scores_TE - q_E).sort(dim=1, descending=True).values[:, top_k - 1 : top_k + 1].unbind(1)
        counted_T = lower_T > LOWEST if valid_T is None else valid_T & (lower_T > LOWEST)
        p_T = (upper_T + lower_T) / 2 if centred else lower_T.clamp_min(0)
        p_T = torch.where(counted_T, p_T, 0.0)
        bids_TE = torch.where(counted_T.unsqueeze(1), scores_TE - p_T.unsqueeze(1), LOWEST)
        falling_TE = bids_TE.sort(dim=0, descending=True).values
        places_E, tokens = (bids_TE > LOWEST).sum(dim=0), counted_T.sum()

        def at(place: Tensor, falling_TE: Tensor = falling_TE, places_E: Tensor = places_E) -> Tensor:
            place_E = torch.minimum(place, places_E - 1).clamp_min(0)
            return falling_TE.gather(0, place_E.unsqueeze(0)).squeeze(0)

        if centred:
            # Place c + 1/2, counted from 1: the middle of the gap, and its continuation to fractional c.
            doubled = 2 * tokens * top_k + E
            rank, fraction = doubled // (2 * E), (doubled % (2 * E)).to(q_E.dtype) / (2 * E)
            new_E = at(rank - 1) + (at(rank) - at(rank - 1)) * fraction
            if n:
                further = overshoot((bids_TE > q_E).sum(dim=0), tokens, top_k).to(q_E.dtype)
                new_E = new_E + further * (new_E - q_E)
        else:
            new_E = at(tokens * top_k // E).clamp_min(0)
        q_E = torch.where((places_E > 0) & (tokens > 0), new_E, q_E)
        if centred:
            q_E = torch.where(tokens > 0, q_E - q_E.mean(), q_E)
    return q_E


def _dual_update_numpy(
    scores_TE: Tensor, dual_E: Tensor, valid_T: Tensor | None, top_k: int, iterations: int, centred: bool
) -> Tensor:
    """Everything per expert in rows: scores are turned round once, then read four times per iteration at most."""
    if valid_T is not None and not bool(valid_T.all()):
        scores_TE = scores_TE[valid_T]
    T, E = scores_TE.shape
    q_E = dual_E.numpy().copy()
    at_once = min(E, max(1, AT_ONCE // max(T, 1)))
    kind = q_E.dtype.type
    threads, dtype = torch.get_num_threads(), scores_TE.dtype
    shapes = [((E, T), dtype), ((threads, at_once, T), dtype), ((threads, work_size(E, T, top_k, threads)), dtype)]
    # Huge scores overflow to infinity as they do in torch.
    with borrowed(shapes) as buffers, np.errstate(all="ignore"):
        buffers[0].copy_(scores_TE.t())
        s_ET, bids, work = (buffer.numpy() for buffer in buffers)
        for n in range(iterations):
            upper_T, lower_T = token_cutoffs(s_ET, q_E, top_k, list(work))
            counted_T = lower_T > LOWEST
            if not counted_T.all():  # they stay away: how many scores of a token are -inf does not depend on q
                s_ET, upper_T, lower_T = s_ET[:, counted_T], upper_T[counted_T], lower_T[counted_T]
            tokens = s_ET.shape[1]
            if tokens == 0:
                break
            p_T = (upper_T + lower_T) / 2 if centred else np.maximum(lower_T, 0)
            if centred:
                rank, rest = divmod(2 * tokens * top_k + E, 2 * E)
                (upper_E, lower_E), any_E, wanted_E = _bids_at(s_ET, p_T, rank - 1, 2, bids, above_E=q_E if n else None)
                new_E = upper_E + (lower_E - upper_E) * (kind(rest) / kind(2 * E))
                if n:  # as `overshoot`
                    off = int(abs(E * wanted_E - tokens * top_k).max())
                    new_E += kind(max(FURTHER - off / (tokens * top_k), 0.0)) * (new_E - q_E)
            else:
                (lower_E,), any_E, _ = _bids_at(s_ET, p_T, tokens * top_k // E, 1, bids)
                new_E = np.maximum(lower_E, 0)
            q_E = np.where(any_E, new_E, q_E)
            if centred:
                q_E -= kind(torch.from_numpy(q_E).mean().item())  # torch's order of summation, for the same bits
    return torch.from_numpy(q_E)


def _bids_at(
    s_ET: Array, p_T: Array, place: int, count: int, bids: Array, *, above_E: Array | None = None
) -> tuple[Array, Array, Array]:
    """`falling_in_place` of s - p, and how many exceed above_E. bids: of each thread, as many rows as it takes experts
    at a time."""
    E, T = s_ET.shape
    free, step = list(bids), bids.shape[1]
    found, any_E, exceeding_E = np.empty((count, E), s_ET.dtype), np.empty(E, bool), np.zeros(E, np.int64)

    @np.errstate(all="ignore")  # holds for one thread
    def run(firsts: Iterable[int]) -> None:
        mine = free.pop()
        for first in firsts:
            some = slice(first, min(first + step, E))
            some_bids = mine[: some.stop - first, :T]
            np.subtract(s_ET[some], p_T, out=some_bids)
            if above_E is not None:  # row by row: counting along an axis takes twice as long
                rows = zip(some_bids, above_E[some], strict=True)
                exceeding_E[some] = [np.count_nonzero(row > above) for row, above in rows]
            found[:, some], any_E[some] = falling_in_place(some_bids, place, count)

    share_out(run, range(0, E, step))
    return found, any_E, exceeding_E
