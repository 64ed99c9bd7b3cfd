"""The auction on a CPU, where to ask who is concerned costs nothing.

A round is of the rows that miss an expert and of the experts that they bid for. From the dual's prices these are few
after the first: of 32768 pairs it left 4, 5 and 8 open in three problems (T = 4096, E = 64, K = 8). Sixteen rounds take
14 ms, and 246 with all rows and all experts in each (one core of a Xeon).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moerouters_base_layers.bidding import bids_of, epsilon_of

Array = npt.NDArray[Any]


def auction_cpu(
    values_UE: Tensor, demand_U: Tensor, capacity: Tensor, price_E: Tensor, *, top_k: int, rounds: int
) -> tuple[Tensor, Tensor]:
    """As `auction`, to the bit; it ends with the round after which nothing is missing."""
    U, E = values_UE.shape
    epsilon, room = epsilon_of(values_UE), int(capacity)
    held_UE = torch.zeros(U, E, dtype=torch.bool)
    missing_U, price_E = demand_U.clone(), price_E.clone()
    # The same memory, for numpy, whose small calls are faster.
    held, missing, price = held_UE.numpy(), missing_U.numpy(), price_E.numpy()
    book = [(np.empty(0, np.int64), np.empty(0, price.dtype))] * E  # rows that each expert has, and their bids
    for _ in range(rounds):
        rows_u = missing_U.nonzero().squeeze(1)
        if not len(rows_u):
            break
        wanted_uE, offers_uE = bids_of(
            values_UE[rows_u], held_UE[rows_u], missing_U[rows_u], price_E, epsilon,
            top_k=top_k, tokens=int((rows_u < U - 1).sum()),
        )  # fmt: skip
        rows, wanted_eu, offers = rows_u.numpy(), wanted_uE.t().contiguous().numpy(), offers_uE.numpy()
        missing[rows] = 0
        for e in np.flatnonzero(wanted_eu.any(axis=1)).tolist():
            bidders_n = np.flatnonzero(wanted_eu[e])
            rows_n = np.concatenate([book[e][0], rows[bidders_n]])
            bids_n = np.concatenate([book[e][1], offers[bidders_n, e]])
            kept_n = _highest(bids_n, rows_n, room)
            held[rows_n, e] = kept_n
            missing[rows_n[~kept_n]] += 1
            book[e] = rows_n, bids_n = rows_n[kept_n], bids_n[kept_n]
            if len(rows_n) == room:
                price[e] = bids_n.min()
    return held_UE, price_E


def _highest(bids_n: Array, rows_n: Array, count: int) -> Array:
    """bool [n]: the `count` highest bids, or all; of equal ones those of the first rows. count >= 1."""
    n = len(bids_n)
    if n <= count:
        return np.ones(n, bool)
    cut = np.partition(bids_n, n - count)[n - count]
    kept_n: Array = bids_n > cut
    equal = np.flatnonzero(bids_n == cut)
    first = equal[rows_n[equal].argsort()]
    kept_n[first[: count - np.count_nonzero(kept_n)]] = True
    return kept_n
