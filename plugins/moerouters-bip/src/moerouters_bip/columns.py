"""Order statistics per expert: which value do the n-th best tokens bid for it?

`dual.py` asks for them in every iteration. Three answers: `LocalColumns` here looks at the tokens of this rank;
`shards.py` finds the same values over the tokens of all ranks; `histogram.py` finds near ones with less talk.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from moerouters.kernels.order_statistic import kth_largest_per_expert

LOWEST = -float("inf")


class Falling(Protocol):
    """The values of [E, T] bids, sorted per expert by falling value; -inf is no bid."""

    tokens: Tensor
    """int64 0-d, tokens that count."""
    places_E: Tensor
    """int64, bids per expert."""

    def falling(self, index: Tensor, count: int) -> Tensor:
        """[count, E], count 1 or 2: each expert's bids at places `index` (int64 0-d, the first place is 0) and after.

        Before the first place stands the first bid, after the last the last; where there is none, anything finite.
        """
        ...


class Columns(Falling, Protocol):
    """The same, and how they stand to the prices so far."""

    wanted_E: Tensor
    """int64, bids per expert that exceed centre_E: as many tokens want it at that price."""


class MakeColumns(Protocol):
    """How columns are made of bids [E, T] and the number of tokens that count here (int64 0-d).

    centre_E: the prices so far, near which the answers are expected. most: no place on this rank lies behind that.
    """

    def __call__(self, bids_ET: Tensor, tokens: Tensor, *, centre_E: Tensor, most: int) -> Columns: ...


class LocalColumns:
    """The bids of this rank."""

    def __init__(self, bids_ET: Tensor, tokens: Tensor, *, centre_E: Tensor, most: int) -> None:
        self.tokens = tokens
        self.places_E = (bids_ET > LOWEST).sum(dim=-1)
        self.wanted_E = (bids_ET > centre_E.unsqueeze(1)).sum(dim=-1)
        self._bids_ET, self._most = bids_ET, most

    def falling(self, index: Tensor, count: int) -> Tensor:
        return kth_largest_per_expert(self._bids_ET.t(), index + 1, count=count, most=self._most)


def between(first: Tensor, index: Tensor, places_E: Tensor) -> Tensor:
    """int64 [E]: `index` put into [first, places_E - 1]; for rows without places, `first`."""
    return torch.maximum(torch.minimum(index, places_E - 1), first)
